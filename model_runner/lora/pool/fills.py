"""Fills under way: adapters copied into their pages a slice at a time, between steps, first come first served.

A fill at once is not queued: all of it lies between what the computation was given before and what it is given after.

    computation   step n-1 (reads page 7) |------- waits -------| step n (reads page 7, of another adapter)
    copies                                | page 7 <- adapter   |

On a CPU the calls themselves are in that order. On CUDA the copies' stream waits for the computation's and then the
other way round; the host waits for neither. So pages that steps before still read may be filled at once.

Knows nothing of steps; who calls says how long a turn may take.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from model_runner.lora.normal_form import NormalForm
from model_runner.lora.pool.pages import Mark, RankPagePool

SLICE_BYTES = 4 << 20
"""Copied before the clock is looked at: a turn is at least this long, about a millisecond."""


@dataclass(eq=False)
class FillTask:
    """One adapter on its way into its pages. `mark` is set when all of it was sent, `took` if that was at once."""

    adapter: NormalForm
    pieces: Iterator[int]
    began: float = field(default_factory=time.perf_counter)
    mark: Mark = None
    took: float | None = None


class FillQueue:
    """The queue of fills of one set of rank pages."""

    def __init__(self, pages: RankPagePool) -> None:
        self._pages = pages
        self._waiting: deque[FillTask] = deque()
        self._sent: deque[FillTask] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._sent)

    @property
    def wait(self) -> float:
        """For how many seconds `advance` need not be called: nothing is left to copy, but some is on its way."""
        return 0.0 if self._waiting else 0.001

    def add(self, adapter: NormalForm, pages: dict[str, list[int]]) -> None:
        """Queues a fill; the adapter is kept until it is done, even if the host tier drops it."""
        self._waiting.append(FillTask(adapter, self._pages.pieces(adapter, pages)))

    def at_once(self, adapter: NormalForm, pages: dict[str, list[int]]) -> None:
        """Fills before whatever the computation is given next; `advance` tells of it like of any other."""
        fill = FillTask(adapter, self._pages.pieces(adapter, pages))
        with self._pages.in_line():
            for _ in fill.pieces:
                pass
        fill.mark, fill.took = self._pages.mark(), time.perf_counter() - fill.began
        self._sent.append(fill)

    def clear(self) -> None:
        """Forgets all of them, as a new scheduler does not know them."""
        self._waiting.clear()
        self._pages.synchronize()
        self._sent.clear()

    def advance(self, seconds: float) -> list[tuple[NormalForm, float]]:
        """Copies at least a slice and no longer than `seconds` beyond it; what is complete, and how long it took."""
        deadline = time.perf_counter() + seconds
        while self._waiting:
            self._copy_slice(self._waiting[0])
            if time.perf_counter() >= deadline:
                break
        return list(self._finished())

    def _copy_slice(self, fill: FillTask) -> None:
        copied = 0
        for size in fill.pieces:
            copied += size
            if copied >= SLICE_BYTES:
                return
        fill.mark = self._pages.mark()
        self._sent.append(self._waiting.popleft())

    def _finished(self) -> Iterator[tuple[NormalForm, float]]:
        while self._sent and self._pages.arrived(self._sent[0].mark):
            fill = self._sent.popleft()
            yield fill.adapter, time.perf_counter() - fill.began if fill.took is None else fill.took
