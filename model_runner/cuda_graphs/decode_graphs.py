"""Decode steps as CUDA graphs: captured once for each padded number of rows, with and without LoRA, then replayed.

    step of 5 rows    | row 3 | row 0 | row 7 | row 1 | row 2 | scratch | scratch | scratch |      padded to 8
    inputs [4, 8]     row, given token (-1: the row's last sampled token), position, lane
    hidden [8, H]     the result of the forward; head and sampling run after the graph, on the same stream

A scratch row's page table is all zeros: its K and V go to page 0, which no request reads. All tensors that a replay
touches keep their addresses: inputs, hidden, the backends' static metadata, caches, pools, last sampled tokens. Lanes
and their pages are metadata, so each replay may use different adapters.

Does not depend on requests, sampling or what a backend's metadata holds. Legend: B padded rows, T tokens (= rows) of
the step, H hidden size.
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

from engine.processes.busy_timer import BusyTimer
from model_runner.compute.attention.base import AttentionBackend
from model_runner.cuda_graphs.primitives import GraphCapture, Work
from model_runner.lora.backends.base import LoraBackend
from model_runner.model.decoders.decoder import Decoder
from model_runner.platform.device import upload_into
from model_runner.step.batch import Batch
from model_runner.step.layout import Ints, Layout
from model_runner.step.rows import RowTable


@dataclass(frozen=True, eq=False)
class CapturedStep:
    """The steps captured for one padded number of rows: static buffers, and replays without (False) and with (True)
    LoRA.
    """

    inputs_4B: torch.Tensor
    attention: Any
    lora: Any
    replays: dict[bool, Work] = field(default_factory=dict)


class DecodeGraphs:
    """The captured decode steps of one model. `sizes` are the padded numbers of rows, ascending."""

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        lora: LoraBackend | None,
        rows: RowTable,
        sizes: Sequence[int],
        capture: GraphCapture,
    ) -> None:
        self.sizes = list(sizes)
        self._decoder, self._attention, self._lora, self._rows = decoder, attention, lora, rows
        self._capture = capture
        weights = decoder.weights
        shape = (self.sizes[-1], decoder.config.hidden_size)
        self._hidden_BH = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        self._captured: dict[int, CapturedStep] = {}

    def capture(self, *, progress: BusyTimer | None = None) -> None:
        """Captures a step for each of `sizes`, the largest first. Must not be called while a step is in flight."""
        order = self.sizes[::-1]
        with (
            _frozen_garbage_collector(),
            tqdm(total=len(order), desc="CUDA graphs", disable=progress is None, leave=False) as bar,
        ):
            for size in order:
                if progress is not None:
                    progress.tick()
                self._captured[size] = self._capture_size(size)
                bar.update()

    def can_replay(self, layout: Layout) -> bool:
        """Whether a captured step fits this layout: all chunks have length 1, and at most `sizes[-1]` of them exist."""
        return layout.chunks <= self.sizes[-1] and layout.tokens == layout.chunks

    def replay(self, layout: Layout, inputs_4T: NDArray[np.int64]) -> torch.Tensor:
        """Replays the step and returns its hidden states [T, H], which are valid until the next call.

        `inputs_4T`: each token's row, given token or -1, position and lane.
        """
        size = self.sizes[bisect_left(self.sizes, layout.chunks)]
        captured, with_lora = self._captured[size], self._lora is not None and bool(layout.lanes_C.any())
        self._plan(captured, self._pad(layout, size), with_lora)
        inputs_4B = np.zeros((4, size), np.int64)
        inputs_4B[:, : layout.chunks] = inputs_4T
        upload_into(inputs_4B, captured.inputs_4B)
        captured.replays[with_lora]()
        return self._hidden_BH[: layout.chunks]

    def _capture_size(self, size: int) -> CapturedStep:
        captured = CapturedStep(
            inputs_4B=torch.zeros(4, size, dtype=torch.int64, device=self._hidden_BH.device),
            attention=self._attention.static(size),
            lora=self._lora.static(size) if self._lora else None,
        )
        none = np.zeros(0, np.int32)
        padding = self._pad(Layout(none, none, none, none, self._rows.tables, self._rows.page_size), size)
        for with_lora in (True, False) if self._lora else (False,):
            self._plan(captured, padding, with_lora)
            captured.replays[with_lora] = self._capture.capture(partial(self._run, captured, with_lora))
        return captured

    def _run(self, captured: CapturedStep, with_lora: bool) -> None:
        """Runs the forward that is captured, from static inputs to hidden states. It must do only device work."""
        rows_B, given_B, positions_B, lanes_B = captured.inputs_4B
        tokens_B = torch.where(given_B < 0, self._rows.last_tokens_R[rows_B], given_B)
        own_norms = with_lora and self._lora is not None and self._lora.pages.norms is not None
        batch = Batch(
            tokens_T=tokens_B,
            positions_T=positions_B,
            attention=captured.attention,
            lora=captured.lora if with_lora else None,
            norm_lanes_T=lanes_B if own_norms else None,
        )
        self._hidden_BH[: len(tokens_B)].copy_(self._decoder.forward(batch))

    def _plan(self, captured: CapturedStep, layout: Layout, with_lora: bool) -> None:
        """Plans the layout into the static metadata of `captured`, in place."""
        planned = self._attention.plan(layout, into=captured.attention)
        assert planned is captured.attention, "the attention backend did not plan into its static metadata"
        if with_lora and self._lora is not None:
            planned = self._lora.plan(layout, into=captured.lora)
            assert planned is captured.lora, "the LoRA backend did not plan into its static metadata"

    def _pad(self, layout: Layout, size: int) -> Layout:
        """Returns the layout padded to `size` rows with scratch rows that use the base model at position 0."""

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
def _frozen_garbage_collector() -> Iterator[None]:
    """Hides all existing objects from the garbage collector, which every capture runs.

    Otherwise each of these runs would walk all objects of the model.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
