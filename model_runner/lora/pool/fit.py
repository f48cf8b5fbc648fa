"""Checks that an adapter fits the pools and a lane, even when they are empty, and names the flags that make room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import AdapterError
from engine.messages import Footprint
from model_runner.lora.normal_form import lane_pages, pages_for
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import EMBED, HEAD, full_weights_of, vectors_of


class Sized(Protocol):
    """An adapter, or the survey of one."""

    @property
    def rank(self) -> int:
        """The highest rank of any slice."""

    @property
    def targets(self) -> list[str]:
        """The names of the modules that the adapter changes ("q_proj")."""

    @property
    def footprint(self) -> Footprint:
        """The pages and slots that it needs, by group."""

    @property
    def vocab_size(self) -> int:
        """The size of its own vocabulary; 0: it has the base's."""


@dataclass(frozen=True)
class PoolFit:
    """The pools, and the largest rank and the modules that they were made for.

    `flag` is the value of --lora-target-modules, as given or as inferred.
    """

    pages: RankPagePool
    max_rank: int
    targets: list[str]
    flag: Sequence[str]

    def check(self, name: str, path: str, adapter: Sized) -> None:
        """Raises AdapterError, naming the flags that would make room, for an adapter that is too large.

        `path` is the adapter's directory.
        """
        flags = [*self._whole(path, adapter), *self._targets(adapter), *self._rank(adapter)]
        if flags:
            rank, modules = f"rank {adapter.rank}", ", ".join(adapter.targets)
            raise AdapterError(
                f"adapter {name!r} ({rank}, {modules}) does not fit the pool made for rank {self.max_rank} on"
                f" {', '.join(self.targets)}: launch with {' '.join(flags)}"
            )

    def _whole(self, path: str, adapter: Sized) -> list[str]:
        """Returns the flags for a whole embedding or head, which may be of a larger vocabulary."""
        needed = [full_weights_of(group) for group in (EMBED, HEAD)]
        missing = [group for group in needed if group in adapter.footprint.pages and not self._count(group)]
        base = next(site.vocabulary for site in self.pages.sites if site.group == EMBED)
        added = adapter.vocab_size - base
        flags = [f"--lora-paths {path}"] if missing or added > self.pages.extra_vocab else []
        return flags + ([f"--lora-extra-vocab-size {added}"] if added > self.pages.extra_vocab else [])

    def _targets(self, adapter: Sized) -> list[str]:
        """Returns the flag that adds the modules of groups without rank pages."""
        named = [group for group in adapter.footprint.pages if not group.endswith(full_weights_of(""))]
        missing = {group.removesuffix(vectors_of("")) for group in named if not self._count(group)}
        lacking = {piece.module for site in self.pages.sites if site.group in missing for piece in site.slices}
        if not lacking & set(adapter.targets):
            return []
        new = lacking if "all" in self.flag else set(adapter.targets)
        more = [
            module for module in adapter.targets if module in new and (module in lacking or module not in self.flag)
        ]
        return [f"--lora-target-modules {' '.join(dict.fromkeys([*self.flag, *more]))}"]

    def _rank(self, adapter: Sized) -> list[str]:
        """Returns the flag for a rank that is too large for a lane, or for all pages of a group."""
        most = lane_pages(self.max_rank)
        counts = adapter.footprint.pages.items()
        large = any(self._count(group) and count > min(self._count(group), most) for group, count in counts)
        needs_groups = any(not self._count(group) and count > pages_for(self.max_rank) for group, count in counts)
        return [f"--max-lora-rank {max(adapter.rank, self.max_rank)}"] if large or needs_groups else []

    def _count(self, group: str) -> int:
        return self.pages.page_counts.get(group, 0)
