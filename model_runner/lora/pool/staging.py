"""Copies from the host to CUDA memory during the computation, by a ring of pinned buffers and a side stream.

    host tier --memcpy--> pinned buffer 0..3 --asynchronous copy on the side stream--> page

Adapters need no pinned memory themselves, and a copy waits for the device only when all buffers are in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BUFFERS = 4


class Staging:
    """The ring of buffers. Each grows to its largest pair of tensors. Allocate the target tensors before the ring."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._buffers: list[torch.Tensor | None] = [None] * BUFFERS
        self._sent: list[torch.cuda.Event] = [_event() for _ in range(BUFFERS)]
        self._next = 0

    @contextmanager
    def into(self, a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields pinned tensors shaped like `a` and `b` (contiguous, on the device) to write; sends them on leaving."""
        number, self._next = self._next, (self._next + 1) % BUFFERS
        self._sent[number].synchronize()
        buffer = self._buffers[number]
        if buffer is None or buffer.nbytes < a.nbytes + b.nbytes:
            buffer = torch.empty(a.nbytes + b.nbytes, dtype=torch.uint8, pin_memory=True)
            self._buffers[number] = buffer
        host_a = buffer[: a.nbytes].view(a.dtype).view(a.shape)
        host_b = buffer[a.nbytes : a.nbytes + b.nbytes].view(b.dtype).view(b.shape)
        yield host_a, host_b
        with torch.cuda.stream(self._stream):
            a.copy_(host_a, non_blocking=True)
            b.copy_(host_b, non_blocking=True)
            self._sent[number].record()

    def wait_for_compute(self) -> None:
        """Makes later copies wait for the work launched on the compute stream so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def make_compute_wait(self) -> None:
        """Makes work launched later on the compute stream wait for the copies so far."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def record(self) -> torch.cuda.Event:
        """Returns an event that comes after everything sent so far."""
        event = _event()
        event.record(self._stream)
        return event


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
