"""The queue of fills: adapters are copied into their pages a slice at a time, between steps, in the order they came.

A fill at once is not queued: all of it is copied after what the computation was given before and ahead of what it is
given next.

    computation   step n-1 (reads page 7) |------- waits -------| step n (reads page 7, of another adapter)
    copies                                | page 7 <- adapter   |

On a CPU the calls themselves are in that order. On CUDA the stream of copies waits for the computation's, then the
computation's for the copies; the host waits for neither. So pages that earlier steps still read may be filled at once.

Knows nothing of steps; the caller says how long `advance` may take.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from model_runner.lora.normal_form import NormalForm
from model_runner.lora.pool.pages import CopyEvent, RankPagePool

SLICE_BYTES = 4 << 20
"""Copied before the clock is read: one `advance` takes at least this long, about a millisecond."""


@dataclass(eq=False)
class FillTask:
    """One adapter on its way into its pages. `sent` is set when all of it was sent, `seconds` if that was at once."""

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
        """For how many seconds `advance` need not be called: 0 while something is left to copy."""
        return 0.0 if self._waiting else 0.001

    def add(self, adapter: NormalForm, pages: dict[str, list[int]]) -> None:
        """Queues a fill; the adapter is kept until it is done, even if the host cache drops it."""
        self._waiting.append(FillTask(adapter, self._pages.copy_pieces(adapter, pages)))

    def fill_at_once(self, adapter: NormalForm, pages: dict[str, list[int]]) -> None:
        """Fills ahead of whatever the computation is given next; `advance` reports it like any other."""
        task = FillTask(adapter, self._pages.copy_pieces(adapter, pages))
        with self._pages.ordered_with_compute():
            for _ in task.pieces:
                pass
        task.sent, task.seconds = self._pages.record_copies(), time.perf_counter() - task.began
        self._sent.append(task)

    def clear(self) -> None:
        """Drops all fills: a new scheduler does not know them."""
        self._waiting.clear()
        self._pages.synchronize()
        self._sent.clear()

    def advance(self, seconds: float) -> list[tuple[NormalForm, float]]:
        """Copies at least a slice, and more until `seconds` have passed; the fills that are complete, and how long each
        took.
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
