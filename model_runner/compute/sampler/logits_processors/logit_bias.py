"""The OpenAI parameter `logit_bias`: adds a number to the logits of some tokens, by one scatter for all rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from engine.messages import NewRow
from model_runner.compute.sampler.logits_processors.base import LogitsProcessor
from model_runner.compute.sampler.parameters import Ints
from model_runner.platform.device import upload


class LogitBias(LogitsProcessor):
    """Keeps the token ids and values of each row that has a bias."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._has_bias = np.zeros(rows, np.bool_)
        self._biases: dict[int, tuple[Ints, NDArray[np.float32]]] = {}

    def begin(self, new: NewRow) -> None:
        # a token outside the vocabulary can neither be drawn nor made likelier: leaving it out changes nothing
        bias = [(token, value) for token, value in new.sampling.logit_bias if 0 <= token < self._vocab_size]
        if bias:
            tokens, values = zip(*bias, strict=True)
            self._has_bias[new.row] = True
            self._biases[new.row] = np.array(tokens, np.int64), np.array(values, np.float32)

    def end(self, row: int) -> None:
        self._biases.pop(row, None)
        self._has_bias[row] = False

    def reset(self) -> None:
        self._biases.clear()
        self._has_bias.fill(False)

    def is_active(self, rows: Ints, positions: Ints) -> bool:
        return bool(self._biases) and bool(self._has_bias[rows].any())

    def apply(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> None:
        biased = np.flatnonzero(self._has_bias[rows]).tolist()
        lines = [(index, *self._biases[int(rows[index])]) for index in biased]
        entries_2E = np.concatenate([[np.full_like(tokens, index), tokens] for index, tokens, _ in lines], axis=1)
        values_E = np.concatenate([values for _, _, values in lines])
        inside_E = entries_2E[1] < logits_SV.shape[1]
        indices_2E = upload(entries_2E[:, inside_E], logits_SV.device)
        values = upload(values_E[inside_E], logits_SV.device)
        logits_SV.index_put_((indices_2E[0], indices_2E[1]), values, accumulate=True)
