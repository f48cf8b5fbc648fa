"""Copies a step's tables to the device: one asynchronous copy each, from a ring of pinned buffers.

A buffer is written again only after its copy has ended; with four buffers this never blocks in practice. Without CUDA
the copy is synchronous.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

BUFFERS = 4


class Upload:
    """The ring of pinned buffers. `send` copies on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.int32)] * BUFFERS
        self._sent: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._next = 0

    def buffer(self, numbers: int) -> NDArray[np.int32]:
        """Returns an unwritten host buffer of `numbers` int32; `send` sends the buffer returned last."""
        self._next = (self._next + 1) % BUFFERS
        event = self._sent[self._next]
        if event is not None:
            event.synchronize()
        if self._buffers[self._next].numel() < numbers:
            room = 1 << max(10, (numbers - 1).bit_length())
            self._buffers[self._next] = torch.empty(room, dtype=torch.int32, pin_memory=self._pinned)
        return self._buffers[self._next][:numbers].numpy()

    def send(self, numbers: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Sends the first `numbers` int32 of the last buffer to `into` or a new tensor. Returns the device tensor."""
        source = self._buffers[self._next][:numbers]
        target = torch.empty(numbers, dtype=torch.int32, device=self._device) if into is None else into
        target[:numbers].copy_(source, non_blocking=True)
        if self._pinned:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._sent[self._next] = event
        return target
