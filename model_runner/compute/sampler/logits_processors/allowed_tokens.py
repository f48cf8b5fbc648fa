"""The parameter `allowed_token_ids`: no other token can be sampled, by a mask over the vocabulary for each row.

Legend: A rows that are masked, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.messages import NewRow
from model_runner.compute.sampler.logits_processors.base import LogitsProcessor
from model_runner.compute.sampler.parameters import Ints
from model_runner.platform.device import upload


class AllowedTokens(LogitsProcessor):
    """Keeps, for each row with allowed tokens, a mask on the device that is True at the others."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._is_masked = np.zeros(rows, np.bool_)
        self._masks_V: dict[int, torch.Tensor] = {}

    def begin(self, new: NewRow) -> None:
        allowed = [token for token in new.sampling.allowed_token_ids if 0 <= token < self._vocab_size]
        if allowed:
            mask_V = torch.ones(self._vocab_size, dtype=torch.bool, device=self._device)
            mask_V[upload(np.array(allowed, np.int64), self._device)] = False
            self._is_masked[new.row] = True
            self._masks_V[new.row] = mask_V

    def end(self, row: int) -> None:
        self._masks_V.pop(row, None)
        self._is_masked[row] = False

    def reset(self) -> None:
        self._masks_V.clear()
        self._is_masked.fill(False)

    def is_active(self, rows: Ints, positions: Ints) -> bool:
        return bool(self._masks_V) and bool(self._is_masked[rows].any())

    def apply(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> None:
        masked = np.flatnonzero(self._is_masked[rows])
        masks_AV = torch.stack([self._masks_V[int(row)] for row in rows[masked]])[:, : logits_SV.shape[1]]
        index_A = upload(masked, self._device)
        logits_SV[index_A] = logits_SV[index_A].masked_fill(masks_AV, float("-inf"))
