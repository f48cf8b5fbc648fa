"""How a piece of device work is recorded once and replayed: as a CUDA graph, or, without CUDA, by running it again.

What is recorded reads and writes buffers that never move; it makes no decision and waits for nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

Work = Callable[[], None]


class Recorder(ABC):
    """Turns work into a replay of it."""

    @abstractmethod
    def record(self, work: Work) -> Work:
        """Runs the work at least once, and returns what repeats it on the buffers' values of that time."""


class EagerRecorder(Recorder):
    """Remembers the work itself: for tests, and to look into a step that a graph would hide."""

    def record(self, work: Work) -> Work:
        work()
        return work


class GraphRecorder(Recorder):
    """CUDA graphs that share one memory pool and are captured on one side stream.

    They may share it because nothing they allocate outlives a replay (answers are copied to buffers outside of the
    pool) and because replays follow one another on the runner's stream. Record the largest first: the others then
    fit into its memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        """First a run outside of the capture: there kernels are compiled, modules loaded, workspaces made.

        The capture is `thread_local`: what other threads do on the device (a library's watchdog, say) must not end it.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


def recorder_for(device: torch.device) -> Recorder | None:
    """The device's own way to record; None where running eagerly is the best there is."""
    return GraphRecorder(device) if device.type == "cuda" else None
