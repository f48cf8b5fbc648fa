"""Captures device work for replay: as a CUDA graph, or, without CUDA, as the function itself.

Captured work reads and writes buffers at fixed addresses. It must not branch on values or wait for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

Work = Callable[[], None]


class GraphCapture(ABC):
    """Turns a function that does device work into a function that replays this work."""

    @abstractmethod
    def capture(self, work: Work) -> Work:
        """Runs `work` at least once and returns a function that repeats it on the current contents of its buffers."""


class EagerCapture(GraphCapture):
    """Replays by calling the function again. Used in tests, and to debug a step whose operations a graph hides."""

    def capture(self, work: Work) -> Work:
        work()
        return work


class CudaGraphCapture(GraphCapture):
    """Captures CUDA graphs that share one memory pool, on one side stream.

    Sharing is safe: nothing that a graph allocates outlives its replay (results are copied to buffers outside the
    pool), and replays follow one another on the runner's stream. Capture the largest graph first, so that smaller
    ones fit into the memory that it allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Work) -> Work:
        """Runs the work once before it captures it, so that kernels are compiled, modules loaded and workspaces
        allocated outside the capture.

        The capture mode is `thread_local`, so that the device calls of other threads (such as NCCL's watchdog) do not
        invalidate a capture.
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


def capture_for(device: torch.device) -> GraphCapture | None:
    """Returns the `GraphCapture` for this device; None on a CPU, where eager steps are as fast."""
    return CudaGraphCapture(device) if device.type == "cuda" else None
