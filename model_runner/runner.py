"""The runner: obeys steps. Fills, lanes, new rows, one forward over the chunks, one token for each that samples.

`launch` puts a step on the device without waiting for it, `finish` waits and makes the answer. A step that
disagrees with what the rows hold raises InternalError: the scheduler and this process no longer agree, and only a
restart mends that. Knows nothing of sockets, requests or text. Legend: C chunks, T tokens of the step, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import RunnerConfig
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
from model_runner.batch import Batch
from model_runner.layout import Layout
from model_runner.sampler import logprobs
from model_runner.sampler.logprobs import Logprobs
from model_runner.sampler.sampler import Sampled

SCORED_ELEMENTS = 1 << 25  # logits of a prompt that are held at once; 128 MiB in float32
FILL_SHARE = 0.1  # of a step's time may be spent on fills after it


@dataclass(frozen=True)
class Flight:
    """A step on the device. `sampling` are the indices of the chunks that sample, `scores` by chunk index."""

    epoch: int
    id: int
    began: float
    sampling: list[int] = field(default_factory=list)
    sampled: Sampled | None = None
    scores: dict[int, list[Logprobs]] = field(default_factory=dict)
    score_widths: dict[int, int] = field(default_factory=dict)


class Runner:
    """One rank: a model, its caches and pools, and the rows of its scheduler."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._step_seconds = 0.0

    @classmethod
    def load(cls, config: RunnerConfig, *, progress: bool = False) -> Runner:
        """Loads model and start-up adapters and sizes everything. Raises ConfigError or AdapterError."""
        with torch.inference_mode():
            return cls(assemble(config, progress=progress))

    @property
    def capacity(self) -> Capacity:
        """What this runner can hold."""
        return self._parts.capacity

    @property
    def family(self) -> str:
        """The model's family, for people."""
        return self._parts.decoder.arch.family

    def execute(self, step: Step) -> StepDone:
        """Does the step and waits for it. Its fills only begin: `advance` goes on with them."""
        return self.finish(self.launch(step))

    def launch(self, step: Step) -> Flight:
        """Puts the step on the device, behind the ones before it."""
        began = time.perf_counter()
        with torch.inference_mode():
            if step.fills or step.lanes:
                self._adapters(step)
            for new in step.new_rows:
                self._parts.rows.begin(new)
                self._parts.sampler.begin(new)
            return self._forward(step, began) if step.chunks else Flight(step.epoch, step.id, began)

    def finish(self, flight: Flight) -> StepDone:
        """Waits for the step's tokens."""
        sampled = flight.sampled
        reported = sampled.messages() if sampled else {}
        tokens = sampled.tokens_S.tolist() if sampled else []
        self._step_seconds = time.perf_counter() - flight.began
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
        """Goes on with fills and loads, for a tenth of the last step at most; what has ended. Never waits."""
        if self._parts.lora is None:
            return []
        with torch.inference_mode():
            return self._parts.lora.advance(FILL_SHARE * self._step_seconds)

    @property
    def wait(self) -> float | None:
        """For how many seconds `advance` need not be called unless `descriptor` is readable; None: for ever."""
        return None if self._parts.lora is None else self._parts.lora.wait

    @property
    def descriptor(self) -> int | None:
        """Readable when a load has news; None without LoRA."""
        return None if self._parts.lora is None else self._parts.lora.loaders.fileno()

    def start_loader(self) -> None:
        """Starts the process that will read adapters, before the first is asked for."""
        if self._parts.lora is not None:
            self._parts.lora.loaders.start()

    def close(self) -> None:
        """Ends the loader processes."""
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
        for chunk in chunks:
            parts.rows.place(chunk)
        layout = _layout(chunks, parts.rows.tables, parts.rows.page_size)
        offsets = layout.offsets()
        batch = Batch(
            tokens_T=self._tokens(chunks, offsets),
            positions_T=self._upload(layout.positions().astype(np.int64)),
            attention=parts.attention.plan(layout),
            lora=parts.lora.backend.plan(layout) if parts.lora and layout.lanes_C.any() else None,
        )
        hidden_TH = parts.decoder.forward(batch)
        scores, widths = self._score(chunks, offsets, hidden_TH)
        sampling = [index for index, chunk in enumerate(chunks) if chunk.samples]
        sampled = self._sample([chunks[index] for index in sampling], offsets[1:][sampling] - 1, hidden_TH)
        return Flight(step.epoch, step.id, began, sampling, sampled, scores, widths)

    def _upload(self, values: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._parts.device)

    def _tokens(self, chunks: list[Chunk], offsets: NDArray[np.int32]) -> torch.Tensor:
        """[T] int64: the tokens that came with the chunks, and the rows' own last samples where none came."""
        tokens = np.zeros(int(offsets[-1]), np.int64)
        places, rows = [], []
        for chunk, begin in zip(chunks, offsets.tolist(), strict=False):  # the last offset is T
            _check_tokens(chunk)
            if chunk.tokens:
                tokens[begin : begin + chunk.length] = chunk.tokens[: chunk.length]
            else:
                places.append(begin)
                rows.append(chunk.row)
        tokens_T = self._upload(tokens)
        if rows:
            own_C = self._parts.rows.last_R[self._upload(np.array(rows, np.int64))]
            tokens_T[self._upload(np.array(places, np.int64))] = own_C
        return tokens_T

    def _sample(self, chunks: list[Chunk], last: NDArray[np.int32], hidden_TH: torch.Tensor) -> Sampled | None:
        """One token for each of these chunks, from the hidden state of its last token; kept as the row's own."""
        if not chunks:
            return None
        rows = np.array([chunk.row for chunk in chunks], np.int64)
        positions = np.array([chunk.start + chunk.length for chunk in chunks], np.int64)
        logits_SV = self._parts.decoder.logits(hidden_TH[self._upload(last.astype(np.int64))])
        sampled = self._parts.sampler.sample(logits_SV, rows, positions)
        self._parts.rows.last_R[self._upload(rows)] = sampled.tokens_S
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
            scores[index] = self._score_chunk(hidden_nH, targets_n, widths[index])
        return scores, widths

    def _score_chunk(self, hidden_nH: torch.Tensor, targets_n: torch.Tensor, top: int) -> list[Logprobs]:
        """The chunk's positions a slice at a time, so that their logits are bounded however long the prompt is."""
        size = max(1, SCORED_ELEMENTS // self.capacity.vocab_size)
        parts = [slice(begin, begin + size) for begin in range(0, len(targets_n), size)]
        return [logprobs.gather(self._parts.decoder.logits(hidden_nH[p]), targets_n[p], top) for p in parts]


def _layout(chunks: list[Chunk], tables: NDArray[np.int32], page_size: int) -> Layout:
    columns = np.array([(c.row, c.start, c.length, c.lane) for c in chunks], np.int32).T
    rows_C, starts_C, lengths_C, lanes_C = columns.copy()
    return Layout(rows_C, starts_C, lengths_C, lanes_C, tables, page_size)


def _check_tokens(chunk: Chunk) -> None:
    expected = chunk.length + (chunk.scores and not chunk.samples)
    decode = not chunk.tokens and chunk.length == 1 and not chunk.scores
    if not decode and len(chunk.tokens) != expected:
        raise InternalError(f"row {chunk.row}: {len(chunk.tokens)} tokens came where {expected} were due")


def _entries(parts: list[Logprobs], width: int) -> list[LogprobIds]:
    return [entry for part in parts for entry in part.messages([width] * len(part.tokens_S))]
