"""Repetition, presence and frequency penalties: the only state the sampler keeps, and only for rows that use them.

One int32 a token and row that counts, in slots that are made when needed:

    bit 30: in the prompt | bits 0..29: how often generated

Knows nothing of the other steps of sampling. Legend: S rows that are penalised, V vocabulary, Q slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model_runner.platform.device import upload

IN_PROMPT = 1 << 30


class Penalties:
    """Which tokens every penalised row has seen."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._seen_QV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._slots: dict[int, int] = {}
        self._free: list[int] = []

    @property
    def bytes(self) -> int:
        """What the counts occupy now."""
        return self._seen_QV.numel() * self._seen_QV.element_size()

    def begin(self, row: int, history: Sequence[int], prompt_length: int) -> None:
        """Row `row` starts with `history`; tokens from `prompt_length` on were generated."""
        if row not in self._slots:
            self._slots[row] = self._free.pop() if self._free else self._grow()
        slot = self._slots[row]
        seen_V = self._seen_QV[slot].zero_()
        tokens = upload(np.array(history, dtype=np.int64), self._device)
        generated = tokens[prompt_length:]
        seen_V.scatter_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
        seen_V[tokens[:prompt_length]] |= IN_PROMPT

    def end(self, row: int) -> None:
        """Row `row` is not penalised (any more)."""
        if row in self._slots:
            self._free.append(self._slots.pop(row))

    def reset(self) -> None:
        """Forgets every row; the memory is kept for the next ones."""
        self._slots.clear()
        self._free = list(range(len(self._seen_QV)))

    def slots(self, rows: Sequence[int]) -> torch.Tensor:
        """[S] int64 on the device: where the counts of these rows are."""
        return upload(np.array([self._slots[row] for row in rows], dtype=np.int64), self._device)

    def apply(self, logits_SV: torch.Tensor, slots_S: torch.Tensor, strengths: NDArray[np.float32]) -> torch.Tensor:
        """[S, V]: penalised logits. `strengths` is [S, 3]: repetition, presence, frequency.

        Repetition divides what is positive and multiplies what is not (Keskar et al. 2019, as everyone does it), for
        tokens of prompt and output; presence is subtracted once, frequency per occurrence, for tokens of the output.
        """
        strengths_S3 = upload(strengths, self._device)
        repetition_S1, presence_S1, frequency_S1 = (strengths_S3[:, i : i + 1] for i in range(3))
        seen_SV = self._seen_QV[:, : logits_SV.shape[1]][slots_S]
        counts_SV = seen_SV & (IN_PROMPT - 1)
        repeated_SV = torch.where(logits_SV > 0, logits_SV / repetition_S1, logits_SV * repetition_S1)
        logits_SV = torch.where(seen_SV != 0, repeated_SV, logits_SV)
        return logits_SV - presence_S1 * (counts_SV > 0) - frequency_S1 * counts_SV

    def count(self, slots_S: torch.Tensor, tokens_S: torch.Tensor) -> None:
        """One more of each row's token. A row stands in a step at most once."""
        self._seen_QV[slots_S, tokens_S] += 1

    def _grow(self) -> int:
        """Doubles the slots; the first new one."""
        old, vocab = self._seen_QV.shape
        self._seen_QV = torch.cat([self._seen_QV, self._seen_QV.new_zeros(max(old, 1), vocab)])
        self._free.extend(range(old + 1, len(self._seen_QV)))
        return old
