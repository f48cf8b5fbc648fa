"""Decode steps, recorded once for each padded number of rows, with and without LoRA, and replayed ever after.

    step of 5 rows    | row 3 | row 0 | row 7 | row 1 | row 2 | scratch | scratch | scratch |      padded to 8
    inputs [4, 8]     the row, the token that came with it (-1: the row's own last sample), the position, the lane
    hidden [8, H]     what the forward answers; head and sampling follow outside, on the same stream

A scratch row has a table of zeros: its K and V go to page 0, which no request reads. Whatever a replay touches lies
where it lay when it was recorded: inputs, hidden, the backends' static metadata, caches, pools, last samples. Lanes
and their pages are metadata, so the adapters may be others at every replay.

Knows nothing of requests, sampling or what a backend's metadata holds. Legend: B padded rows, T tokens (= rows) of the
step, H hidden size.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from model_runner.compute.attention.base import AttentionBackend
from model_runner.lora.backends.base import LoraBackend
from model_runner.model.families.decoder import Decoder
from model_runner.platform.device import send
from model_runner.step.batch import Batch
from model_runner.step.layout import Ints, Layout
from model_runner.step.recorder import Recorder, Work
from model_runner.step.rows import RowTable


@dataclass(frozen=True, eq=False)
class Recorded:
    """One padded size: its buffers, and a replay without (False) and with (True) LoRA."""

    inputs_4B: torch.Tensor
    attention: Any
    lora: Any
    replays: dict[bool, Work] = field(default_factory=dict)


class Graphs:
    """The recorded steps of one model. `sizes` are the padded numbers of rows, ascending."""

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        lora: LoraBackend | None,
        rows: RowTable,
        sizes: Sequence[int],
        recorder: Recorder,
    ) -> None:
        self.sizes = list(sizes)
        self._decoder, self._attention, self._lora, self._rows = decoder, attention, lora, rows
        self._recorder = recorder
        weights = decoder.weights
        shape = (self.sizes[-1], decoder.config.hidden_size)
        self._hidden_BH = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        self._recorded: dict[int, Recorded] = {}

    def record(self, *, progress: bool = False) -> None:
        """Records every size, the largest first. No step may be in flight."""
        order = self.sizes[::-1]
        with _uncollected(), tqdm(total=len(order), desc="CUDA graphs", disable=not progress, leave=False) as bar:
            for size in order:
                self._recorded[size] = self._record(size)
                bar.update()

    def takes(self, layout: Layout) -> bool:
        """Whether a replay can do this step: every chunk of length 1, and not too many."""
        return layout.chunks <= self.sizes[-1] and layout.tokens == layout.chunks

    def forward(self, layout: Layout, inputs_4T: NDArray[np.int64]) -> torch.Tensor:
        """[T, H], valid until the next call. `inputs_4T`: rows, tokens that came or -1, positions, lanes."""
        size = self.sizes[bisect_left(self.sizes, layout.chunks)]
        recorded, with_lora = self._recorded[size], self._lora is not None and bool(layout.lanes_C.any())
        self._plan(recorded, self._pad(layout, size), with_lora)
        inputs_4B = np.zeros((4, size), np.int64)
        inputs_4B[:, : layout.chunks] = inputs_4T
        send(inputs_4B, recorded.inputs_4B)
        recorded.replays[with_lora]()
        return self._hidden_BH[: layout.chunks]

    def _record(self, size: int) -> Recorded:
        recorded = Recorded(
            inputs_4B=torch.zeros(4, size, dtype=torch.int64, device=self._hidden_BH.device),
            attention=self._attention.static(size),
            lora=self._lora.static(size) if self._lora else None,
        )
        none = np.zeros(0, np.int32)
        padding = self._pad(Layout(none, none, none, none, self._rows.tables, self._rows.page_size), size)
        for with_lora in (True, False) if self._lora else (False,):
            self._plan(recorded, padding, with_lora)
            recorded.replays[with_lora] = self._recorder.record(partial(self._work, recorded, with_lora))
        return recorded

    def _work(self, recorded: Recorded, with_lora: bool) -> None:
        """What is recorded: from inputs to hidden, and nothing of the host."""
        rows_B, given_B, positions_B, lanes_B = recorded.inputs_4B
        tokens_B = torch.where(given_B < 0, self._rows.last_R[rows_B], given_B)
        own_norms = with_lora and self._lora is not None and self._lora.pages.norms is not None
        batch = Batch(
            tokens_T=tokens_B,
            positions_T=positions_B,
            attention=recorded.attention,
            lora=recorded.lora if with_lora else None,
            norm_lanes_T=lanes_B if own_norms else None,
        )
        self._hidden_BH[: len(tokens_B)].copy_(self._decoder.forward(batch))

    def _plan(self, recorded: Recorded, layout: Layout, with_lora: bool) -> None:
        """Fills the static metadata in place; what comes back must be what went in."""
        planned = self._attention.plan(layout, into=recorded.attention)
        assert planned is recorded.attention, "attention planned a static step elsewhere"
        if with_lora and self._lora is not None:
            planned = self._lora.plan(layout, into=recorded.lora)
            assert planned is recorded.lora, "LoRA planned a static step elsewhere"

    def _pad(self, layout: Layout, size: int) -> Layout:
        """The layout and scratch rows up to `size`: start 0, the base."""

        def padded(values: Ints, filler: int) -> Ints:
            return np.pad(values, (0, size - len(values)), constant_values=filler)

        return Layout(
            rows_C=padded(layout.rows_C, self._rows.scratch),
            starts_C=padded(layout.starts_C, 0),
            lengths_C=padded(layout.lengths_C, 1),
            lanes_C=padded(layout.lanes_C, 0),
            tables=layout.tables,
            page_size=layout.page_size,
        )


@contextmanager
def _uncollected() -> Iterator[None]:
    """What is alive stays out of the garbage collector's way: every capture runs one, over a whole model."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
