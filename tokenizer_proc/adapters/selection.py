"""The adapters that one request runs through: entries with their scales, and whether they go together.

A request holds the entries it resolved, not their names. Knows nothing of HTTP or the scheduler's link.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from engine.errors import AdapterError, InvalidRequest
from tokenizer_proc.adapters.entry import Entry
from tokenizer_proc.adapters.tokenizers import TextTools


class AdapterSelection(msgspec.Struct, frozen=True):
    """Entries with their scales; an empty list stands for the base model."""

    parts: list[tuple[Entry, float]] = []

    @property
    def lora(self) -> list[tuple[int, float]]:
        """(adapter_id, scale) pairs, as the scheduler takes them."""
        return [(entry.source.adapter_id, scale) for entry, scale in self.parts]

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return [entry.source.name for entry, _ in self.parts]

    @property
    def own_vocabulary(self) -> Entry | None:
        """The adapter whose own vocabulary the request uses; None: it uses the base's."""
        sole = self._sole
        return sole if sole is not None and sole.vocab_size else None

    @property
    def text_tools(self) -> TextTools | None:
        """The adapters' text tools where all of them have the same, else None: the base's."""
        found = {id(entry.text_tools): entry.text_tools for entry, _ in self.parts}
        return next(iter(found.values())) if len(found) == 1 else None

    @property
    def is_current(self) -> bool:
        """Every adapter is loaded, and its name was not taken from it."""
        return all(entry.is_loaded and not entry.draining for entry, _ in self.parts)

    @property
    def failure(self) -> str | None:
        """Why one of the adapters can no longer be served."""
        for entry, _ in self.parts:
            if entry.state.state == "failed":
                return f"adapter `{entry.source.name}`: {entry.state.error or 'it could not be loaded'}"
        return None

    @property
    def pages(self) -> dict[str, int]:
        """Rank pages by group that one lane of these adapters takes, as far as their footprints are known."""
        pages: dict[str, int] = {}
        for entry, _ in self.parts:
            for group, count in entry.state.footprint.pages.items():
                pages[group] = pages.get(group, 0) + count
        return pages

    def check(self, max_lane_pages: int) -> None:
        """Raises AdapterError for an adapter that failed, InvalidRequest for adapters that do not go together."""
        if self.failure is not None:
            raise AdapterError(self.failure, param="lora_path")
        self._check_vocabularies()
        self._check_invocations()
        self._check_pages(max_lane_pages)

    @contextlib.contextmanager
    def held(self, count: int = 1) -> Iterator[None]:
        """While entered, counts `count` requests as users of every entry."""
        for entry, _ in self.parts:
            entry.in_flight += count
        try:
            yield
        finally:
            for entry, _ in self.parts:
                entry.in_flight -= count

    @property
    def _sole(self) -> Entry | None:
        """The one adapter, if its scale is 1; None for the base, a mix, and an adapter that is scaled."""
        return self.parts[0][0] if len(self.parts) == 1 and self.parts[0][1] == 1.0 else None

    def _check_vocabularies(self) -> None:
        for entry, _ in self.parts:
            if entry.vocab_size and entry is not self._sole:
                raise InvalidRequest(
                    f"adapter `{entry.name}` has a vocabulary of its own: it can neither be mixed nor scaled",
                    param="lora_path",
                )

    def _check_invocations(self) -> None:
        """Activated adapters act from a token of the prompt on, each from another one, so they are not mixed."""
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
