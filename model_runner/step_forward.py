"""Computes one step: the forward over its chunks, a token for each chunk that samples, and the scores of prompts.

Nothing here waits for the device: the results are a LaunchedStep. A step that contradicts the rows raises
InternalError. Legend: C chunks, T tokens of the step, S rows that need logits, n scored positions, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.messages import Chunk, Step
from model_runner.build.assembly import Parts
from model_runner.compute.sampler import logprobs
from model_runner.compute.sampler.logprobs import Logprobs
from model_runner.compute.sampler.sampler import Sampled
from model_runner.launched_step import LaunchedStep
from model_runner.lora.site import EMBED, EXPERTS, HEAD, full_weights_of
from model_runner.platform.device import DeviceEvent, upload
from model_runner.step.batch import Batch
from model_runner.step.chunks import check_numbers, inputs_of, layout_of
from model_runner.step.layout import Layout

SCORED_ELEMENTS = 1 << 25
"""The most logits that are in memory at once when a prompt is scored: 128 MiB in float32."""


class StepForward:
    """Computes steps with a runner's parts."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def launch(self, step: Step, began: float) -> LaunchedStep:
        """Queues the computation of the step's chunks on the device, after the steps launched before."""
        parts, chunks = self._parts, step.chunks
        known_lanes = parts.lora.pages.lanes if parts.lora else ()
        for chunk in chunks:
            check_numbers(chunk, known_lanes, parts.capacity.kv_pages)
            parts.rows.add_chunk(chunk)
        layout = layout_of(chunks, parts.rows.tables, parts.rows.page_size)
        offsets = layout.offsets()
        hidden_TH = self._hidden(layout, inputs_of(chunks, layout))
        scores, widths = self._score(chunks, offsets, hidden_TH)
        sampling = [index for index, chunk in enumerate(chunks) if chunk.samples]
        sampled = self._sample([chunks[index] for index in sampling], offsets[1:][sampling] - 1, hidden_TH)
        sampled = sampled.on_host() if sampled else None
        scores = {index: [part.on_host() for part in found] for index, found in scores.items()}
        return LaunchedStep(step.epoch, step.id, began, DeviceEvent(parts.device), sampling, sampled, scores, widths)

    def _upload(self, values: NDArray[np.int64]) -> torch.Tensor:
        return upload(values, self._parts.device)

    def _hidden(self, layout: Layout, inputs_4T: NDArray[np.int64]) -> torch.Tensor:
        """Computes the hidden states [T, H]: replays a CUDA graph if one fits the step, else runs eagerly."""
        parts = self._parts
        lanes_T = self._lanes(layout, EXPERTS, full_weights_of(EMBED))
        lanes = set(layout.lanes_C.tolist()) if layout.lanes_C.any() else set()
        own_norms = bool(lanes) and parts.lora is not None and parts.lora.pages.refresh_norms(lanes)
        if parts.graphs is not None and lanes_T is None and parts.graphs.can_replay(layout):
            return parts.graphs.replay(layout, inputs_4T)
        rows_T, given_T, positions_T, norm_lanes_T = self._upload(inputs_4T)
        batch = Batch(
            tokens_T=torch.where(given_T < 0, parts.rows.last_tokens_R[rows_T], given_T),
            positions_T=positions_T,
            attention=parts.attention.plan(layout),
            lora=parts.lora.backend.plan(layout) if parts.lora and layout.lanes_C.any() else None,
            lanes_T=lanes_T,
            norm_lanes_T=norm_lanes_T if own_norms else None,
        )
        return parts.decoder.forward(batch)

    def _lanes(self, layout: Layout, *groups: str) -> NDArray[np.int32] | None:
        """Returns each token's lane [T] if a lane of the step uses one of `groups`, else None (the faster path)."""
        lora = self._parts.lora
        if lora is None:
            return None
        existing = [group for group in groups if group in lora.pages.page_counts]
        if not any(lora.pages.any_lane_uses(set(layout.lanes_C), group) for group in existing):
            return None
        return np.repeat(layout.lanes_C, layout.lengths_C)

    def _sample(self, chunks: Sequence[Chunk], last: NDArray[np.int32], hidden_TH: torch.Tensor) -> Sampled | None:
        """Samples a token for each of `chunks` from the hidden state of its last token, and stores the token by row.

        `last` are the indices of these last tokens in the step.
        """
        if not chunks:
            return None
        rows = np.array([chunk.row for chunk in chunks], np.int64)
        positions = np.array([chunk.start + chunk.length for chunk in chunks], np.int64)
        hidden_SH = hidden_TH[self._upload(last.astype(np.int64))]
        logits_SV = self._parts.decoder.logits(hidden_SH, *self._plan_head([(chunk.lane, 1) for chunk in chunks]))
        sampled = self._parts.sampler.sample(logits_SV, rows, positions)
        self._parts.rows.last_tokens_R[self._upload(rows)] = sampled.tokens_S
        return sampled

    def _score(
        self, chunks: Sequence[Chunk], offsets: NDArray[np.int32], hidden_TH: torch.Tensor
    ) -> tuple[dict[int, list[Logprobs]], dict[int, int]]:
        """Returns two dicts, keyed by the index of each chunk that scores.

        They hold the log-probabilities of the chunk's tokens after the first, and the number of alternatives to report.
        """
        scores: dict[int, list[Logprobs]] = {}
        widths: dict[int, int] = {}
        for index, chunk in enumerate(chunks):
            if not chunk.scores:
                continue
            widths[index] = max(0, int(self._parts.sampler.table.prompt_logprobs[chunk.row]))
            targets_n = self._upload(np.array(chunk.tokens[1:], np.int64))
            hidden_nH = hidden_TH[int(offsets[index]) :][: len(targets_n)]
            asked = self._parts.sampler.table.asked.get(chunk.row, [])
            scores[index] = self._score_chunk(hidden_nH, targets_n, widths[index], chunk.lane, asked)
        return scores, widths

    def _score_chunk(
        self, hidden_nH: torch.Tensor, targets_n: torch.Tensor, top: int, lane: int, asked: Sequence[int]
    ) -> list[Logprobs]:
        """Scores the positions in pieces, so that the memory for logits is bounded for any prompt length."""
        size = max(1, SCORED_ELEMENTS // self._parts.capacity.vocab_size)
        found = []
        for begin in range(0, len(targets_n), size):
            targets = targets_n[begin : begin + size]
            lora = self._plan_head([(lane, len(targets))])
            logits = self._parts.decoder.logits(hidden_nH[begin : begin + size], *lora)
            found.append(logprobs.gather(logits, targets, top, [asked] * len(targets) if asked else ()))
        return found

    def _plan_head(self, runs: list[tuple[int, int]]) -> tuple[Any, NDArray[np.int32] | None]:
        """Returns the LoRA arguments of Decoder.logits for `runs` of (lane, number of rows).

        These are the backend's plan if a lane uses the head, else None, and each row's lane if a lane has a full head,
        else None.
        """
        lora = self._parts.lora
        if lora is None:
            return None, None
        lanes_C, lengths_C = np.array(runs, np.int32).T.copy()
        nothing_C = np.zeros_like(lanes_C)
        layout = Layout(nothing_C, nothing_C, lengths_C, lanes_C, np.zeros((1, 1), np.int32), 1)
        used = lora.pages.any_lane_uses({lane for lane, _ in runs}, HEAD)
        return lora.backend.plan(layout) if used else None, self._lanes(layout, full_weights_of(HEAD))
