"""The runner: obeys steps. Fills, lanes, new rows, one forward over the chunks, one token for each that samples.

`launch` puts a step on the device without waiting for it, and what is to be read of it on its way to the host;
`finish` waits for that alone and makes the answer, so a step that was launched behind it delays nothing. A step that
disagrees with what the rows hold raises InternalError: the scheduler and this process no longer agree, and only a
restart mends that. Knows nothing of sockets, requests or text. Legend: C chunks, T tokens of the step, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config.sections import RunnerConfig
from engine.errors import InternalError
from engine.messages import (
    AdapterState,
    Capacity,
    Chunk,
    EvictAdapter,
    LoadAdapter,
    LogprobIds,
    Step,
    StepDone,
    UnloadAdapter,
)
from model_runner.assembly import Parts, assemble
from model_runner.compute.sampler import logprobs
from model_runner.compute.sampler.logprobs import Logprobs
from model_runner.compute.sampler.sampler import Sampled
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import EMBED, EXPERTS, HEAD, full_weights_of
from model_runner.platform.device import DeviceEvent, device_memory, upload
from model_runner.step.batch import Batch
from model_runner.step.layout import Layout

SCORED_ELEMENTS = 1 << 25  # logits of a prompt that are held at once; 128 MiB in float32
FILL_SHARE = 0.1  # of a step's time may be spent on fills after it
FILL_SHARE_ALONE = 1.0  # the same after a step in which nobody decodes: nobody waits for his next token


@dataclass(frozen=True)
class Flight:
    """A step on the device. `sampling` are the indices of the chunks that sample, `scores` by chunk index; both are
    on the host from `arrival` on.
    """

    epoch: int
    id: int
    began: float
    arrival: DeviceEvent
    sampling: list[int] = field(default_factory=list)
    sampled: Sampled | None = None
    scores: dict[int, list[Logprobs]] = field(default_factory=dict)
    score_widths: dict[int, int] = field(default_factory=dict)


class Runner:
    """One rank: a model, its caches and pools, and the rows of its scheduler."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._step_seconds = self._ended = 0.0
        self._graph_bytes = 0
        self._decoding = False

    @classmethod
    def load(cls, config: RunnerConfig, *, progress: bool = False) -> Runner:
        """Loads model and start-up adapters and sizes everything. Raises ConfigError or AdapterError."""
        with torch.inference_mode():
            parts = assemble(config, progress=progress)
            runner = cls(parts)
            if parts.graphs is not None:
                before = device_memory(parts.device)[1]
                parts.graphs.capture(progress=progress)
                runner._graph_bytes = max(0, before - device_memory(parts.device)[1])
            return runner

    @property
    def capacity(self) -> Capacity:
        """What this runner can hold."""
        return self._parts.capacity

    def memory(self) -> dict[str, int]:
        """Bytes of the device by what holds them; `rest` is what the computation has taken so far."""
        total, free = device_memory(self._parts.device)
        c = self.capacity
        known = {"weights": c.weight_bytes, "KV": c.kv_bytes, "rank pages": c.lora_bytes, "graphs": self._graph_bytes}
        return {**known, "rest": max(0, total - free - sum(known.values())), "free": free}

    @property
    def rank_pages(self) -> RankPagePool | None:
        """The pools and lanes; None without LoRA."""
        return None if self._parts.lora is None else self._parts.lora.pages

    @property
    def graph_sizes(self) -> list[int]:
        """The numbers of rows that decode steps are padded to; none where every step is launched bit by bit."""
        return [] if self._parts.graphs is None else self._parts.graphs.sizes

    @property
    def family(self) -> str:
        """The model's family, for people."""
        return self._parts.decoder.config.family

    def execute(self, step: Step) -> StepDone:
        """Does the step and waits for it. Its fills only begin: `advance` goes on with them."""
        return self.finish(self.launch(step))

    def launch(self, step: Step) -> Flight:
        """Puts the step on the device, behind the ones before it."""
        began = time.perf_counter()
        self._decoding = any(not chunk.tokens for chunk in step.chunks)
        with torch.inference_mode():
            if step.fills or step.lanes:
                self._adapters(step)
            for new in step.new_rows:
                self._parts.rows.begin(new)
                self._parts.sampler.begin(new)
            if not step.chunks:
                return Flight(step.epoch, step.id, began, DeviceEvent(self._parts.device))
            return self._forward(step, began)

    def finish(self, flight: Flight) -> StepDone:
        """Waits for the step's tokens. Its seconds run from its launch, or from the end of the step before it."""
        flight.arrival.wait()
        sampled = flight.sampled
        reported = sampled.messages() if sampled else {}
        tokens = sampled.tokens_S.tolist() if sampled else []
        now = time.perf_counter()
        self._step_seconds, self._ended = now - max(flight.began, self._ended), now
        return StepDone(
            epoch=flight.epoch,
            id=flight.id,
            tokens=tokens,
            logprobs={flight.sampling[index]: found for index, found in reported.items()},
            prompt_logprobs={
                index: _entries(parts, flight.score_widths[index]) for index, parts in flight.scores.items()
            },
            seconds=self._step_seconds,
        )

    def load_adapter(self, message: LoadAdapter) -> AdapterState | None:
        """Brings an adapter to the host tier; doing it twice is harmless. Its state (host, or failed and why) if it is
        known at once; else `advance` will have it.
        """
        if self._parts.lora is None:
            off = f"{message.path}: LoRA is off; launch with --enable-lora"
            return AdapterState(adapter_id=message.adapter_id, state="failed", error=off)
        return self._parts.lora.load(message)

    def unload_adapter(self, message: UnloadAdapter) -> AdapterState:
        """Frees the adapter's host memory; what is being loaded for it is dropped."""
        if self._parts.lora is None:
            return AdapterState(adapter_id=message.adapter_id, state="gone")
        return self._parts.lora.unload(message.adapter_id)

    def evict_adapter(self, message: EvictAdapter) -> AdapterState:
        """Frees the adapter's host memory until it is loaded again."""
        if self._parts.lora is None:
            return AdapterState(adapter_id=message.adapter_id, state="disk")
        return self._parts.lora.evict(message.adapter_id)

    def advance(self) -> list[AdapterState]:
        """Goes on with fills and loads, for a tenth of the last step (or as long, if nobody decoded in it); what has
        ended; and takes what was compiled meanwhile. Never waits.
        """
        self._parts.kernels.poll()
        if self._parts.lora is None:
            return []
        share = FILL_SHARE if self._decoding else FILL_SHARE_ALONE
        with torch.inference_mode():
            return self._parts.lora.advance(share * self._step_seconds)

    @property
    def wait(self) -> float | None:
        """For how many seconds `advance` need not be called unless `descriptor` is readable; None: for ever."""
        waits = [self._parts.kernels.poll_seconds, None if self._parts.lora is None else self._parts.lora.poll_seconds]
        return min((seconds for seconds in waits if seconds is not None), default=None)

    @property
    def descriptor(self) -> int | None:
        """Readable when a load has news; None without LoRA."""
        return None if self._parts.lora is None else self._parts.lora.loaders.fileno()

    def start_loader(self) -> None:
        """Starts the process that will read adapters, before the first is asked for."""
        if self._parts.lora is not None:
            self._parts.lora.loaders.start()

    def close(self) -> None:
        """Ends the loader processes, and the builder."""
        self._parts.kernels.close()
        if self._parts.lora is not None:
            self._parts.lora.loaders.close()

    def reset(self) -> None:
        """Forgets rows, lanes and fills; adapters in the host tier stay."""
        self._parts.rows.reset()
        self._parts.sampler.reset()
        if self._parts.lora is not None:
            self._parts.lora.reset()

    def _adapters(self, step: Step) -> None:
        """The step's fills and lanes."""
        if self._parts.lora is None:
            raise InternalError(f"step {step.id} speaks of adapters, and LoRA is off")
        for fill in step.fills:
            self._parts.lora.fill(fill)
        for lane in step.lanes:
            self._parts.lora.point(lane)

    def _forward(self, step: Step, began: float) -> Flight:
        parts, chunks = self._parts, step.chunks
        known = parts.lora.pages.lanes if parts.lora else ()
        for chunk in chunks:
            _check_numbers(chunk, known, parts.capacity.kv_pages)
            parts.rows.add_chunk(chunk)
        layout = _layout(chunks, parts.rows.tables, parts.rows.page_size)
        offsets = layout.offsets()
        hidden_TH = self._hidden(layout, _inputs(chunks, layout))
        scores, widths = self._score(chunks, offsets, hidden_TH)
        sampling = [index for index, chunk in enumerate(chunks) if chunk.samples]
        sampled = self._sample([chunks[index] for index in sampling], offsets[1:][sampling] - 1, hidden_TH)
        sampled = sampled.on_host() if sampled else None
        scores = {index: [part.on_host() for part in found] for index, found in scores.items()}
        return Flight(step.epoch, step.id, began, DeviceEvent(parts.device), sampling, sampled, scores, widths)

    def _upload(self, values: NDArray[np.int64]) -> torch.Tensor:
        return upload(values, self._parts.device)

    def _hidden(self, layout: Layout, inputs_4T: NDArray[np.int64]) -> torch.Tensor:
        """[T, H]: replays a captured step if there is one for it, else runs the forward eagerly."""
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
        """Each token's lane, where one touches such a group; None elsewhere, so that nobody else pays for it."""
        lora = self._parts.lora
        made = [group for group in groups if lora is not None and group in lora.pages.page_counts]
        if lora is None or not any(lora.pages.any_lane_uses(set(layout.lanes_C), group) for group in made):
            return None
        return np.repeat(layout.lanes_C, layout.lengths_C)

    def _sample(self, chunks: list[Chunk], last: NDArray[np.int32], hidden_TH: torch.Tensor) -> Sampled | None:
        """One token for each of these chunks, from the hidden state of its last token; kept as the row's own."""
        if not chunks:
            return None
        rows = np.array([chunk.row for chunk in chunks], np.int64)
        positions = np.array([chunk.start + chunk.length for chunk in chunks], np.int64)
        hidden_SH = hidden_TH[self._upload(last.astype(np.int64))]
        logits_SV = self._parts.decoder.logits(hidden_SH, *self._head_lora([(chunk.lane, 1) for chunk in chunks]))
        sampled = self._parts.sampler.sample(logits_SV, rows, positions)
        self._parts.rows.last_tokens_R[self._upload(rows)] = sampled.tokens_S
        return sampled

    def _score(
        self, chunks: list[Chunk], offsets: NDArray[np.int32], hidden_TH: torch.Tensor
    ) -> tuple[dict[int, list[Logprobs]], dict[int, int]]:
        """Log-probabilities of the tokens that came with chunks that score, after their first; alternatives wanted."""
        scores: dict[int, list[Logprobs]] = {}
        widths: dict[int, int] = {}
        for index, chunk in enumerate(chunks):
            if not chunk.scores:
                continue
            widths[index] = max(0, int(self._parts.sampler.table.prompt_logprobs[chunk.row]))
            targets_n = self._upload(np.array(chunk.tokens[1:], np.int64))
            hidden_nH = hidden_TH[int(offsets[index]) :][: len(targets_n)]
            scores[index] = self._score_chunk(hidden_nH, targets_n, widths[index], chunk.lane)
        return scores, widths

    def _score_chunk(self, hidden_nH: torch.Tensor, targets_n: torch.Tensor, top: int, lane: int) -> list[Logprobs]:
        """The chunk's positions a slice at a time, so that their logits are bounded however long the prompt is."""
        size = max(1, SCORED_ELEMENTS // self.capacity.vocab_size)
        found = []
        for begin in range(0, len(targets_n), size):
            targets = targets_n[begin : begin + size]
            lora = self._head_lora([(lane, len(targets))])
            logits = self._parts.decoder.logits(hidden_nH[begin : begin + size], *lora)
            found.append(logprobs.gather(logits, targets, top))
        return found

    def _head_lora(self, runs: list[tuple[int, int]]) -> tuple[Any, NDArray[np.int32] | None]:
        """For rows of the head, as runs of (lane, rows): the backend's plan where a lane touches the head, and their
        lanes where one brings a head of its own.
        """
        lora = self._parts.lora
        if lora is None:
            return None, None
        lanes_C, lengths_C = np.array(runs, np.int32).T.copy()
        nothing_C = np.zeros_like(lanes_C)
        layout = Layout(nothing_C, nothing_C, lengths_C, lanes_C, np.zeros((1, 1), np.int32), 1)
        touched = lora.pages.any_lane_uses({lane for lane, _ in runs}, HEAD)
        return lora.backend.plan(layout) if touched else None, self._lanes(layout, full_weights_of(HEAD))


def _layout(chunks: list[Chunk], tables: NDArray[np.int32], page_size: int) -> Layout:
    columns = np.array([(c.row, c.start, c.length, c.lane) for c in chunks], np.int32).T
    rows_C, starts_C, lengths_C, lanes_C = columns.copy()
    return Layout(rows_C, starts_C, lengths_C, lanes_C, tables, page_size)


def _inputs(chunks: list[Chunk], layout: Layout) -> NDArray[np.int64]:
    """[4, T]: each token's row, the token that came with its chunk or -1 (the row's own last sample), its position, and
    its lane.
    """
    given_T: list[int] = []
    for chunk in chunks:
        _check_tokens(chunk)
        given_T += chunk.tokens[: chunk.length] or [-1]
    rows_T, lanes_T = np.repeat(layout.rows_C, layout.lengths_C), np.repeat(layout.lanes_C, layout.lengths_C)
    columns = (rows_T, np.array(given_T, np.int64), layout.positions(), lanes_T)
    return np.stack(columns, dtype=np.int64, casting="unsafe")


def _check_numbers(chunk: Chunk, lanes: Container[int], kv_pages: int) -> None:
    """What would be another row's, counted from the end, or silently the base's. Page 0 is scratch: it is nobody's."""
    if chunk.start < 0 or (chunk.pages and not 0 <= min(chunk.pages) <= max(chunk.pages) <= kv_pages):
        raise InternalError(f"row {chunk.row}: start {chunk.start}, pages {chunk.pages[:8]} of {kv_pages}")
    if chunk.lane and chunk.lane not in lanes:
        raise InternalError(f"row {chunk.row}: lane {chunk.lane} was never told of")
    if chunk.tokens and min(chunk.tokens) < 0:
        raise InternalError(f"row {chunk.row}: token {min(chunk.tokens)}")


def _check_tokens(chunk: Chunk) -> None:
    expected = chunk.length + (chunk.scores and not chunk.samples)
    decode = not chunk.tokens and chunk.length == 1 and not chunk.scores
    if not decode and len(chunk.tokens) != expected:
        raise InternalError(f"row {chunk.row}: {len(chunk.tokens)} tokens came where {expected} were due")


def _entries(parts: list[Logprobs], width: int) -> list[LogprobIds]:
    return [entry for part in parts for entry in part.messages([width] * len(part.tokens_S))]
