"""Plans how the torch backend computes a step in the layers that have one window size: what it gathers in torch, and
what the C++ kernel computes.

Legend: T tokens of the step, C chunks, L gathered positions, n tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model_runner.platform.device import upload
from model_runner.step.layout import Layout

SHORTEST_BUCKET = 64
"""Decodes that see at most this number of keys are all gathered together."""


@dataclass(frozen=True)
class DecodeGather:
    """Chunks of length 1 that are computed together.

    tokens_C   the index of each chunk's token in the batch, None if the step has no other chunks
    slots_CL   the slots that each chunk sees, padded
    seen_CL    which of these slots are not padding
    """

    tokens_C: torch.Tensor | None
    slots_CL: torch.Tensor
    seen_CL: torch.Tensor


@dataclass(frozen=True)
class PrefillGather:
    """A chunk of several tokens: the tokens begin..end - 1 of the batch, and the slots that they see.

    seen_nL   which slots each token sees; None: the tokens see only the chunk itself, causally
    """

    begin: int
    end: int
    slots_L: torch.Tensor
    seen_nL: torch.Tensor | None


@dataclass(frozen=True)
class GatherPlan:
    """How a step is computed in the layers that have one window size.

    `kernel_plan` is the C++ kernel's argument `plan`, None if the kernel computes no chunk.
    """

    decodes: list[DecodeGather]
    prefills: list[PrefillGather]
    kernel_plan: torch.Tensor | None


def make_plan(layout: Layout, window: int | None, device: torch.device, *, use_kernel: bool) -> GatherPlan:
    """Returns the plan of a step. With `use_kernel` the C++ kernel computes all chunks that it supports."""
    offsets, single = layout.offsets(), layout.lengths_C == 1
    in_torch = np.full(layout.chunks, not use_kernel)
    if use_kernel and window is not None:  # in the kernel all tokens of a chunk have the same first slot
        in_torch = ~single & (layout.starts_C + layout.lengths_C > window)
    in_kernel = np.flatnonzero(~in_torch)
    decodes = _buckets(layout, in_torch & single, window)
    return GatherPlan(
        [_plan_decode(layout, chunks, offsets, window, device) for chunks in decodes],
        [
            _plan_prefill(layout, chunk, offsets, window, device)
            for chunk in np.flatnonzero(in_torch & ~single).tolist()
        ],
        _plan_kernel(layout, in_kernel, offsets, window) if len(in_kernel) else None,
    )


def _plan_kernel(layout: Layout, chunks_C: Any, offsets: Any, window: int | None) -> torch.Tensor:
    """Returns the kernel's argument `plan` (see kernels/cpu/functions/attention.py): the number of rows; each row's
    first token, its number of tokens and the end of its slots; the slots of all rows.
    """
    lengths_C = layout.lengths_C[chunks_C].astype(np.int64)
    stops_C = layout.starts_C[chunks_C].astype(np.int64) + lengths_C
    seen_C = stops_C if window is None else np.minimum(stops_C, window)
    ends_C = seen_C.cumsum()
    positions = np.arange(ends_C[-1]) + np.repeat(stops_C - ends_C, seen_C)
    slots = _slots(layout, np.repeat(layout.rows_C[chunks_C], seen_C), positions)
    parts = [[len(chunks_C)], offsets[chunks_C], lengths_C, ends_C, slots]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _plan_decode(layout: Layout, chunks_C: Any, offsets: Any, window: int | None, device: torch.device) -> DecodeGather:
    last_C = layout.starts_C[chunks_C].astype(np.int64)
    first_C = np.zeros_like(last_C) if window is None else np.maximum(last_C - window + 1, 0)
    longest = int((last_C - first_C).max()) + 1
    positions_CL = first_C[:, None] + np.arange(longest)
    seen_CL = positions_CL <= last_C[:, None]
    positions_CL = np.minimum(positions_CL, last_C[:, None])
    slots_CL = _slots(layout, layout.rows_C[chunks_C][:, None], positions_CL)
    return DecodeGather(
        None if len(chunks_C) == layout.chunks else upload(offsets[chunks_C].astype(np.int64), device),
        upload(slots_CL, device),
        upload(seen_CL, device),
    )


def _plan_prefill(layout: Layout, chunk: int, offsets: Any, window: int | None, device: torch.device) -> PrefillGather:
    start, length = int(layout.starts_C[chunk]), int(layout.lengths_C[chunk])
    begin, stop = int(offsets[chunk]), start + length
    first = 0 if window is None else max(0, start - window + 1)
    keys_L, queries_n = np.arange(first, stop), np.arange(start, stop)[:, None]
    seen_nL = None
    if start or (window is not None and window < stop):
        seen_nL = keys_L <= queries_n
        if window is not None:
            seen_nL &= keys_L > queries_n - window
    slots_L = upload(_slots(layout, layout.rows_C[chunk], keys_L), device)
    return PrefillGather(begin, begin + length, slots_L, None if seen_nL is None else upload(seen_nL, device))


def _buckets(layout: Layout, which_C: NDArray[np.bool_], window: int | None) -> list[NDArray[np.intp]]:
    """Groups chunks by the number of keys that they see, rounded up to a power of two of at least SHORTEST_BUCKET.

    So less than half of what is gathered for a bucket is padding, except in the shortest bucket.
    """
    buckets: dict[int, list[int]] = {}
    for chunk in np.flatnonzero(which_C).tolist():
        seen = int(layout.starts_C[chunk]) + 1
        length = seen if window is None else min(seen, window)
        buckets.setdefault(max(SHORTEST_BUCKET, 1 << (length - 1).bit_length()), []).append(chunk)
    return [np.array(chunks) for _, chunks in sorted(buckets.items())]


def _slots(layout: Layout, rows: Any, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the slots, in the flat cache, of these positions of these rows."""
    pages: NDArray[np.int64] = layout.tables[rows, positions // layout.page_size].astype(np.int64)
    slots: NDArray[np.int64] = pages * layout.page_size + positions % layout.page_size
    return slots
