"""The adapters that one request uses: entries with their scales, and checks whether they can be combined.

A request holds the entries that its names resolved to, not the names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from engine.errors import AdapterError, InvalidRequest
from tokenizer_proc.adapters.entry import Entry
from tokenizer_proc.adapters.tokenizers import TextTools


class AdapterSelection(msgspec.Struct, frozen=True):
    """The entries that a request uses, with their scales. An empty list selects the base model."""

    parts: list[tuple[Entry, float]] = []

    @property
    def lora(self) -> list[tuple[int, float]]:
        """The (adapter_id, scale) pairs that the scheduler expects."""
        return [(entry.source.adapter_id, scale) for entry, scale in self.parts]

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return [entry.source.name for entry, _ in self.parts]

    @property
    def own_vocabulary(self) -> Entry | None:
        """The adapter whose own vocabulary the request uses, or None if the request uses the base's vocabulary."""
        sole = self._sole
        return sole if sole is not None and sole.vocab_size else None

    @property
    def text_tools(self) -> TextTools | None:
        """The text tools that all the adapters share; None, which selects the base's, if they share none."""
        found = {id(entry.text_tools): entry.text_tools for entry, _ in self.parts}
        return next(iter(found.values())) if len(found) == 1 else None

    @property
    def is_current(self) -> bool:
        """Whether every adapter is loaded and still has its name."""
        return all(entry.is_loaded and not entry.draining for entry, _ in self.parts)

    @property
    def failure(self) -> str | None:
        """The reason why one of the adapters cannot be served, or None if none has failed."""
        for entry, _ in self.parts:
            if entry.state.state == "failed":
                reason = entry.state.error or "it could not be loaded"
                return reason if reason.startswith("adapter ") else f"adapter `{entry.source.name}`: {reason}"
        return None

    @property
    def pages(self) -> dict[str, int]:
        """The number of rank pages by group that one lane of these adapters needs, as far as footprints are known."""
        pages: dict[str, int] = {}
        for entry, _ in self.parts:
            for group, count in entry.state.footprint.pages.items():
                pages[group] = pages.get(group, 0) + count
        return pages

    def check(self, max_lane_pages: int) -> None:
        """Raises AdapterError if an adapter failed, and InvalidRequest if the adapters cannot be combined.

        `max_lane_pages` is the largest number of rank pages in one group that a request may need.
        """
        if self.failure is not None:
            raise AdapterError(self.failure, param="lora_path")
        self._check_vocabularies()
        self._check_invocations()
        self._check_pages(max_lane_pages)

    @contextlib.contextmanager
    def held(self, count: int = 1) -> Iterator[None]:
        """While entered, adds `count` to the number of requests in flight of every entry."""
        for entry, _ in self.parts:
            entry.in_flight += count
        try:
            yield
        finally:
            for entry, _ in self.parts:
                entry.in_flight -= count

    @property
    def _sole(self) -> Entry | None:
        """The only adapter, if its scale is 1; None for the base model, a mix, or an adapter with another scale."""
        return self.parts[0][0] if len(self.parts) == 1 and self.parts[0][1] == 1.0 else None

    def _check_vocabularies(self) -> None:
        for entry, _ in self.parts:
            if entry.vocab_size and entry is not self._sole:
                raise InvalidRequest(
                    f"adapter `{entry.name}` has a vocabulary of its own: it can neither be mixed nor scaled",
                    param="lora_path",
                )

    def _check_invocations(self) -> None:
        """Raises InvalidRequest for a mix with an activated LoRA (aLoRA).

        Each activated LoRA takes effect from its own invocation tokens in the prompt on.
        """
        for entry, _ in self.parts if len(self.parts) > 1 else []:
            if entry.state.invocation:
                raise InvalidRequest(
                    f"adapter `{entry.name}` acts from its invocation on (alora_invocation_tokens): do not mix it",
                    param="lora_path",
                )

    def _check_pages(self, most: int) -> None:
        for group, pages in self.pages.items():
            if pages > most:
                raise InvalidRequest(
                    f"the mix needs {pages} rank pages in {group}; at most {most} fit one request: "
                    "mix fewer adapters, or raise --max-lora-rank",
                    param="lora_path",
                )
