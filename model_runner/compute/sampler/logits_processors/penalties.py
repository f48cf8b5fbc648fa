"""Repetition, presence and frequency penalties, from one int32 for each vocabulary token and each row with penalties:

    bit 30: the token is in the prompt | bits 0..29: how often it was generated

The counts of a row are in a slot; slots are allocated when rows need them. Legend: S rows that sample, P of them
penalised, V vocabulary, Q slots.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from engine.messages import NewRow
from model_runner.compute.sampler.logits_processors.base import LogitsProcessor
from model_runner.compute.sampler.parameters import Ints
from model_runner.platform.device import upload

IN_PROMPT = 1 << 30
NEUTRAL = (1.0, 0.0, 0.0)
"""The repetition, presence and frequency penalties that change no logits."""
NO_SLOT = -1


class Penalties(LogitsProcessor):
    """Keeps each row's penalties [rows, 3] and slot on the host, and the token counts of each slot on the device."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._penalties = np.tile(np.array(NEUTRAL, np.float32), (rows, 1))
        self._counts_QV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._slots = np.full(rows, NO_SLOT, np.int64)
        self._free: list[int] = []
        self._applied: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def bytes(self) -> int:
        """The device memory of the counts, in bytes."""
        return self._counts_QV.numel() * self._counts_QV.element_size()

    def begin(self, new: NewRow) -> None:
        sampling = new.sampling
        penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        self._penalties[new.row] = penalties
        if tuple(self._penalties[new.row].tolist()) == NEUTRAL:
            return
        slot = self._slots[new.row] = self._free.pop() if self._free else self._grow()
        counts_V = self._counts_QV[slot].zero_()
        tokens = upload(np.array(new.history, dtype=np.int64), self._device)
        generated = tokens[new.prompt_length :]
        counts_V.scatter_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
        counts_V[tokens[: new.prompt_length]] |= IN_PROMPT

    def end(self, row: int) -> None:
        if self._slots[row] != NO_SLOT:
            self._free.append(int(self._slots[row]))
            self._slots[row] = NO_SLOT

    def reset(self) -> None:
        """Forgets all rows; the slots stay allocated."""
        self._slots.fill(NO_SLOT)
        self._free = list(range(len(self._counts_QV)))

    def is_active(self, rows: Ints, positions: Ints) -> bool:
        return len(self._free) < len(self._counts_QV) and bool((self._slots[rows] != NO_SLOT).any())

    def apply(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> None:
        """Applies the penalties in place.

        For tokens of the prompt and the output, the repetition penalty divides positive logits and multiplies negative
        ones (Keskar et al. 2019, 1909.05858). For tokens of the output, the presence penalty is subtracted once and the
        frequency penalty once per occurrence.
        """
        penalised = np.flatnonzero(self._slots[rows] != NO_SLOT)
        rows_P = rows[penalised]
        index_P, slots_P = upload(penalised, self._device), upload(self._slots[rows_P], self._device)
        logits_SV[index_P] = self._penalise(logits_SV[index_P], slots_P, self._penalties[rows_P])
        self._applied = index_P, slots_P

    def _penalise(self, logits_PV: torch.Tensor, slots_P: torch.Tensor, penalties: NDArray[np.float32]) -> torch.Tensor:
        penalties_P3 = upload(penalties, self._device)
        repetition_P1, presence_P1, frequency_P1 = (penalties_P3[:, i : i + 1] for i in range(3))
        seen_PV = self._counts_QV[:, : logits_PV.shape[1]][slots_P]
        counts_PV = seen_PV & (IN_PROMPT - 1)
        repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
        logits_PV = torch.where(seen_PV != 0, repeated_PV, logits_PV)
        return logits_PV - presence_P1 * (counts_PV > 0) - frequency_P1 * counts_PV

    def accept(self, tokens_S: torch.Tensor, rows: Ints) -> None:
        assert self._applied is not None, "accept follows apply"
        index_P, slots_P = self._applied
        self._counts_QV[slots_P, tokens_S[index_P]] += 1

    def _grow(self) -> int:
        """Doubles the number of slots. Returns the first new slot."""
        old, vocab = self._counts_QV.shape
        self._counts_QV = torch.cat([self._counts_QV, self._counts_QV.new_zeros(max(old, 1), vocab)])
        self._free.extend(range(old + 1, len(self._counts_QV)))
        return old
