"""Captures device work for replay: as a CUDA graph, or, without CUDA, as the function itself.

Captured work reads and writes buffers at fixed addresses; it branches on no values and waits for nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

Work = Callable[[], None]


class GraphCapture(ABC):
    """Turns work into a replay of it."""

    @abstractmethod
    def capture(self, work: Work) -> Work:
        """Runs the work at least once; returns a function that repeats it on what the buffers then hold."""


class EagerCapture(GraphCapture):
    """Replays by running the work again: for tests, and for debugging a step that a graph would hide."""

    def capture(self, work: Work) -> Work:
        work()
        return work


class CudaGraphCapture(GraphCapture):
    """CUDA graphs that share one memory pool and are captured on one side stream.

    Sharing is safe: nothing that a graph allocates outlives its replay (results are copied to buffers outside the
    pool), and replays follow one another on the runner's stream. Capture the largest first, so that the smaller ones
    fit into its memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Work) -> Work:
        """Runs the work once before the capture: there kernels are compiled, modules loaded, workspaces allocated.

        The mode is `thread_local`: what other threads do on the device (NCCL's watchdog, say) must not end a capture.
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
    """How to capture on this device; None where eager steps are as fast."""
    return CudaGraphCapture(device) if device.type == "cuda" else None
