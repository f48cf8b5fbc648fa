"""The queue of fills: adapters are copied into their pages a slice at a time, between steps, in the order of arrival.

A fill with `at_once` is not queued: the whole adapter is copied after the work that was launched before the fill and
ahead of the work that is launched next.

    computation   step n-1 (reads page 7) |------- waits -------| step n (reads page 7, of another adapter)
    copies                                | page 7 <- adapter   |

On a CPU the calls are made in this order. On CUDA the copy stream waits for the compute stream, then the compute stream
for the copy stream; the host waits for neither. So pages that earlier steps still read may be filled at once.

Does not depend on steps: the caller says how long `advance` may take.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from model_runner.lora.normal_form import NormalForm
from model_runner.lora.pool.pages import CopyEvent, RankPagePool

SLICE_BYTES = 4 << 20
"""Bytes that are copied before the clock is read, so one `advance` takes about a millisecond at least."""


@dataclass(eq=False)
class FillTask:
    """One fill under way. `sent` is set once the whole adapter was sent, `seconds` only if it was filled at once."""

    adapter: NormalForm
    pieces: Iterator[int]
    began: float = field(default_factory=time.perf_counter)
    sent: CopyEvent = None
    seconds: float | None = None


class FillQueue:
    """The fills of one rank page pool."""

    def __init__(self, pages: RankPagePool) -> None:
        self._pages = pages
        self._waiting: deque[FillTask] = deque()
        self._sent: deque[FillTask] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._sent)

    @property
    def poll_seconds(self) -> float:
        """The seconds for which `advance` need not be called: 0 while something is left to copy."""
        return 0.0 if self._waiting else 0.001

    def add(self, adapter: NormalForm, pages: dict[str, list[int]]) -> None:
        """Queues a fill. The adapter is kept in memory until the fill is done, even if the host tier drops it."""
        self._waiting.append(FillTask(adapter, self._pages.copy_pieces(adapter, pages)))

    def fill_at_once(self, adapter: NormalForm, pages: dict[str, list[int]]) -> None:
        """Fills the pages ahead of the work that is launched next. `advance` reports the fill like any other."""
        task = FillTask(adapter, self._pages.copy_pieces(adapter, pages))
        with self._pages.ordered_with_compute():
            for _ in task.pieces:
                pass
        task.sent, task.seconds = self._pages.record_copies(), time.perf_counter() - task.began
        self._sent.append(task)

    def clear(self) -> None:
        """Drops all fills, because a new scheduler does not know them."""
        self._waiting.clear()
        self._pages.synchronize()
        self._sent.clear()

    def advance(self, seconds: float) -> list[tuple[NormalForm, float]]:
        """Copies at least a slice, and more until `seconds` have passed.

        Returns the fills that are complete, each as the adapter and the seconds that the fill took.
        """
        deadline = time.perf_counter() + seconds
        while self._waiting:
            self._copy_slice(self._waiting[0])
            if time.perf_counter() >= deadline:
                break
        return list(self._pop_finished())

    def _copy_slice(self, task: FillTask) -> None:
        copied = 0
        for size in task.pieces:
            copied += size
            if copied >= SLICE_BYTES:
                return
        task.sent = self._pages.record_copies()
        self._sent.append(self._waiting.popleft())

    def _pop_finished(self) -> Iterator[tuple[NormalForm, float]]:
        while self._sent and self._pages.has_arrived(self._sent[0].sent):
            task = self._sent.popleft()
            yield task.adapter, time.perf_counter() - task.began if task.seconds is None else task.seconds
