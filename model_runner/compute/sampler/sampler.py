"""The sampler: one step's logits to one token a row, by the order of operations in the package's docstring.

Every row's parameters are host arrays (ParameterTable); the only state on the device are the counts of penalised
rows. Work is done for the rows that need it: a greedy batch is one argmax. Legend: S rows that sample, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.messages import LogprobIds, NewRow
from model_runner.compute.sampler import filters, logits_processors, logprobs
from model_runner.compute.sampler.draws import inverse_cdf, uniforms
from model_runner.compute.sampler.parameters import Ints, ParameterTable
from model_runner.compute.sampler.penalties import Penalties
from model_runner.platform.device import download, upload

SLICE_ELEMENTS = 1 << 24  # logits that are drawn from at once; float64 edges of them are 128 MiB


@dataclass(frozen=True)
class Sampled:
    """What a step sampled, on the device: tokens [S], and log-probabilities of the rows that asked.

    `reported` are their indices into the step's sampling rows, `widths` how many alternatives each wants.
    """

    tokens_S: torch.Tensor
    logprobs: logprobs.Logprobs | None
    reported: list[int]
    widths: list[int]

    def on_host(self) -> Sampled:
        """The same on its way to the host."""
        found = None if self.logprobs is None else self.logprobs.on_host()
        return Sampled(download(self.tokens_S), found, self.reported, self.widths)

    def messages(self) -> dict[int, LogprobIds]:
        """Log-probabilities by index into the step's sampling rows; waits for what is still on a device."""
        if self.logprobs is None:
            return {}
        return dict(zip(self.reported, self.logprobs.messages(self.widths), strict=True))


class Sampler:
    """Draws tokens for the rows of one runner. `vocab_size` is the largest; a step's logits may be narrower."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._rows = rows
        self._vocab_size = vocab_size
        self._device = device
        self.table = ParameterTable(rows, vocab_size)
        self._penalties = Penalties(vocab_size, device)

    def begin(self, new: NewRow) -> None:
        """A row's new generation: its parameters, and its history where a penalty needs it."""
        self.table.begin(new)
        if self.table.penalised(np.array([new.row]))[0]:
            self._penalties.begin(new.row, new.history, new.prompt_length)
        else:
            self._penalties.end(new.row)

    def reset(self) -> None:
        """Forgets every row."""
        self.table = ParameterTable(self._rows, self._vocab_size)
        self._penalties.reset()

    def sample(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> Sampled:
        """Draws one token for each of `rows`, which stand at `positions` (of the token that is drawn).

        `logits_SV` is float32 and stays as it is. Never waits for the device.
        """
        edited_SV = self._edit(logits_SV, rows, positions)
        penalised = np.nonzero(self.table.penalised(rows))[0]
        if not len(penalised):
            tokens_S = self._choose(edited_SV, rows, positions)
            return self._report(logits_SV, tokens_S, rows)
        index, slots = self._upload(penalised), self._penalties.slots(rows[penalised].tolist())
        edited_SV = edited_SV.clone() if edited_SV is logits_SV else edited_SV
        edited_SV[index] = self._penalties.apply(edited_SV[index], slots, self.table.strengths[rows[penalised]])
        tokens_S = self._choose(edited_SV, rows, positions)
        self._penalties.count(slots, tokens_S[index])
        return self._report(logits_SV, tokens_S, rows)

    def _upload(self, values: Ints) -> torch.Tensor:
        return upload(values, self._device)

    def _edit(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> torch.Tensor:
        """Logit biases and min_tokens, on a copy where there are any."""
        vocab = logits_SV.shape[1]
        bias = logits_processors.biases(self.table, rows, vocab)
        banned = logits_processors.forbidden(self.table, rows, positions, vocab)
        if bias is None and banned is None:
            return logits_SV
        edited_SV = logits_SV.clone()
        if bias is not None:
            logits_processors.add(edited_SV, bias)
        if banned is not None:
            logits_processors.forbid(edited_SV, banned)
        return edited_SV

    def _choose(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> torch.Tensor:
        """[S]: the best token of greedy rows, a draw for the others; filtered rows apart, in bounded slices."""
        tokens_S = logits_SV.argmax(-1)
        filtered = self.table.filtered(rows)
        random = self.table.temperature[rows] > 0.0
        size = max(1, SLICE_ELEMENTS // logits_SV.shape[1])
        for chosen, narrow in ((random & ~filtered, False), (random & filtered, True)):
            where = np.nonzero(chosen)[0]
            for begin in range(0, len(where), size):
                part = where[begin : begin + size]
                index = self._upload(part)
                tokens_S[index] = self._draw(logits_SV[index], rows[part], positions[part], narrow)
        return tokens_S

    def _draw(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints, narrow: bool) -> torch.Tensor:
        table = self.table
        logits_SV = logits_SV / upload(table.temperature[rows], self._device)[:, None]
        if narrow:
            kept_SV = filters.keep(logits_SV, table.top_k[rows], table.top_p[rows], table.min_p[rows])
            logits_SV = logits_SV.masked_fill(~kept_SV, float("-inf"))
        u_S = uniforms(self._upload(table.seed[rows]), self._upload(positions))
        return inverse_cdf(logits_SV, u_S)

    def _report(self, logits_SV: torch.Tensor, tokens_S: torch.Tensor, rows: Ints) -> Sampled:
        reported = np.nonzero(self.table.logprobs[rows] >= 0)[0]
        if not len(reported):
            return Sampled(tokens_S, None, [], [])
        widths = self.table.logprobs[rows[reported]].tolist()
        index = self._upload(reported)
        found = logprobs.gather(logits_SV[index], tokens_S[index], max(widths))
        return Sampled(tokens_S, found, reported.tolist(), widths)
