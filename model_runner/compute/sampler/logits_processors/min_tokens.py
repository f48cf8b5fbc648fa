"""The parameter `min_tokens`: end ids cannot be sampled until a row has `min_tokens` output tokens."""

from __future__ import annotations

import numpy as np
import torch

from engine.messages import NewRow
from model_runner.compute.sampler.logits_processors.base import LogitsProcessor
from model_runner.compute.sampler.parameters import Ints
from model_runner.platform.device import upload


class MinTokens(LogitsProcessor):
    """Keeps, for each row with `min_tokens`, its end ids and the first position where they are allowed."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._end_ids: dict[int, Ints] = {}
        self._allowed_from = np.zeros(rows, np.int64)  # 0 (allowed everywhere) for rows without end ids

    def begin(self, new: NewRow) -> None:
        end_ids = [token for token in new.sampling.end_ids if 0 <= token < self._vocab_size]
        if end_ids and new.sampling.min_tokens > 0:
            self._end_ids[new.row] = np.array(end_ids, np.int64)
            self._allowed_from[new.row] = new.prompt_length + new.sampling.min_tokens

    def end(self, row: int) -> None:
        self._end_ids.pop(row, None)
        self._allowed_from[row] = 0

    def reset(self) -> None:
        self._end_ids.clear()
        self._allowed_from.fill(0)

    def is_active(self, rows: Ints, positions: Ints) -> bool:
        return bool(self._end_ids) and bool((positions < self._allowed_from[rows]).any())

    def apply(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> None:
        masked = np.flatnonzero(positions < self._allowed_from[rows]).tolist()
        lines = [(index, self._end_ids[int(rows[index])]) for index in masked]
        entries_2E = np.concatenate([[np.full_like(tokens, index), tokens] for index, tokens in lines], axis=1)
        indices_2E = upload(entries_2E[:, entries_2E[1] < logits_SV.shape[1]], logits_SV.device)
        logits_SV.index_put_((indices_2E[0], indices_2E[1]), logits_SV.new_full((), float("-inf")))
