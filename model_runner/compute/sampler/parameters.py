"""The sampling parameters of every row, in host arrays that a step indexes by its rows. Uses no tensors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.messages import NewRow
from model_runner.compute.sampler.draws import as_int64

GREEDY_BELOW = 1e-5  # logits divided by a lower temperature would overflow

Ints = NDArray[np.int64]


class ParameterTable:
    """Each row's temperature, filters, seed, and the log-probabilities to report; `begin` writes a row's entries.

    top_k 0, top_p 1 and min_p 0 switch the filter off. logprobs and prompt_logprobs are the number of alternatives to
    report, or -1 for no report; `asked` has the tokens that a row reports beside them.
    """

    def __init__(self, rows: int) -> None:
        self.temperature = np.zeros(rows, np.float32)
        self.top_k = np.zeros(rows, np.int64)
        self.top_p = np.ones(rows, np.float64)
        self.min_p = np.zeros(rows, np.float64)
        self.seed = np.zeros(rows, np.int64)
        self.logprobs = np.full(rows, -1, np.int64)
        self.prompt_logprobs = np.full(rows, -1, np.int64)
        self.asked: dict[int, list[int]] = {}

    def begin(self, new: NewRow) -> None:
        """Writes the parameters of the request that holds row `new.row` from now on."""
        row, sampling = new.row, new.sampling
        self.temperature[row] = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
        self.top_k[row] = max(sampling.top_k, 0)
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.seed[row] = as_int64(sampling.seed)
        self.logprobs[row] = sampling.logprobs
        self.prompt_logprobs[row] = sampling.prompt_logprobs
        self.asked.pop(row, None)
        if sampling.token_ids_logprob:
            self.asked[row] = sampling.token_ids_logprob

    def uses_filters(self, rows: Ints) -> NDArray[np.bool_]:
        """Returns which of these rows use top_k, top_p or min_p, as a boolean array."""
        unfiltered = (self.top_k[rows] == 0) & (self.top_p[rows] >= 1.0) & (self.min_p[rows] <= 0.0)
        return np.asarray(~unfiltered)
