"""The sampling parameters of every row, as host arrays that a step picks its rows from. No tensors here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.messages import NewRow
from model_runner.compute.sampler.draws import signed

GREEDY_BELOW = 1e-5  # a temperature under this would overflow logits / temperature

Ints = NDArray[np.int64]


class ParameterTable:
    """One line a row. `begin` writes it; everything else reads the arrays.

    strengths  [rows, 3] float32: repetition, presence and frequency penalty
    biases     by row, (token ids, values) where there is a logit bias
    end_ids    by row, what `min_tokens` forbids
    logprobs   alternatives to report beside the sampled token, -1 = nothing
    """

    def __init__(self, rows: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.temperature = np.zeros(rows, np.float32)
        self.top_k = np.zeros(rows, np.int64)
        self.top_p = np.ones(rows, np.float64)
        self.min_p = np.zeros(rows, np.float64)
        self.seed = np.zeros(rows, np.int64)
        self.strengths = np.tile(np.array([1.0, 0.0, 0.0], np.float32), (rows, 1))
        self.first_free = np.zeros(rows, np.int64)  # the position from which end ids are allowed
        self.logprobs = np.full(rows, -1, np.int64)
        self.prompt_logprobs = np.full(rows, -1, np.int64)
        self.biases: dict[int, tuple[Ints, NDArray[np.float32]]] = {}
        self.end_ids: dict[int, Ints] = {}

    def begin(self, new: NewRow) -> None:
        """Row `new.row` is `new` from now on."""
        row, sampling = new.row, new.sampling
        self.temperature[row] = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
        self.top_k[row] = max(sampling.top_k, 0)
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.seed[row] = signed(sampling.seed)
        self.strengths[row] = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        self.first_free[row] = new.prompt_length + sampling.min_tokens
        self.logprobs[row] = sampling.logprobs
        self.prompt_logprobs[row] = sampling.prompt_logprobs
        self.biases.pop(row, None)
        self.end_ids.pop(row, None)
        # a token outside the vocabulary can neither be drawn nor made likelier: leaving it out changes nothing
        bias = [(token, value) for token, value in sampling.logit_bias if 0 <= token < self._vocab_size]
        if bias:
            self.biases[row] = np.array([t for t, _ in bias], np.int64), np.array([v for _, v in bias], np.float32)
        ends = [token for token in sampling.end_ids if 0 <= token < self._vocab_size]
        if ends and sampling.min_tokens > 0:
            self.end_ids[row] = np.array(ends, np.int64)

    def penalised(self, rows: Ints) -> NDArray[np.bool_]:
        """Which of these rows use a penalty."""
        neutral: NDArray[np.bool_] = (self.strengths[rows] == (1.0, 0.0, 0.0)).all(axis=1)
        return ~neutral

    def filtered(self, rows: Ints) -> NDArray[np.bool_]:
        """Which of these rows use top_k, top_p or min_p."""
        unfiltered = (self.top_k[rows] == 0) & (self.top_p[rows] >= 1.0) & (self.min_p[rows] <= 0.0)
        return np.asarray(~unfiltered)
