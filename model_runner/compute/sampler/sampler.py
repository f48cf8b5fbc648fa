"""The sampler: one step's logits to one token a row, by the order of operations in the package's docstring.

Work is done only for the rows that need it: a greedy batch without logits processors is one argmax. Does not know any
logits processor by name. Legend: S rows that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.messages import LogprobIds, NewRow
from model_runner.compute.sampler import filters, logprobs
from model_runner.compute.sampler.draws import inverse_cdf, uniforms
from model_runner.compute.sampler.logits_processors.base import LogitsProcessor
from model_runner.compute.sampler.logits_processors.registry import create_all
from model_runner.compute.sampler.parameters import Ints, ParameterTable
from model_runner.platform.device import download, upload

SLICE_ELEMENTS = 1 << 24  # logits that are drawn from at once; their float64 cumulated sums are 128 MiB


@dataclass(frozen=True)
class Sampled:
    """What a step sampled, on the device: tokens [S], and log-probabilities of the rows that asked for them.

    `reported` are the indices of these rows among the step's sampling rows, `widths` their numbers of alternatives.
    """

    tokens_S: torch.Tensor
    logprobs: logprobs.Logprobs | None
    reported: list[int]
    widths: list[int]

    def on_host(self) -> Sampled:
        """Starts the copy to the host."""
        copied = None if self.logprobs is None else self.logprobs.on_host()
        return Sampled(download(self.tokens_S), copied, self.reported, self.widths)

    def messages(self) -> dict[int, LogprobIds]:
        """Log-probabilities by index among the step's sampling rows; waits for the copy to the host."""
        if self.logprobs is None:
            return {}
        return dict(zip(self.reported, self.logprobs.messages(self.widths), strict=True))


class Sampler:
    """Draws tokens for the rows of one runner. `vocab_size` is the largest; a step's logits may be narrower.

    `processors` are applied in their order; None: all of the registry.
    """

    def __init__(
        self, rows: int, vocab_size: int, device: torch.device, processors: Sequence[LogitsProcessor] | None = None
    ) -> None:
        self._rows = rows
        self._device = device
        self._processors = create_all(rows, vocab_size, device) if processors is None else list(processors)
        self.table = ParameterTable(rows)

    def begin(self, new: NewRow) -> None:
        """A new request holds the row `new.row`: takes over its parameters, forgets those of the one before."""
        self.table.begin(new)
        for processor in self._processors:
            processor.end(new.row)
            processor.begin(new)

    def reset(self) -> None:
        """Forgets all rows."""
        self.table = ParameterTable(self._rows)
        for processor in self._processors:
            processor.reset()

    def sample(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> Sampled:
        """Draws one token for each of `rows`; `positions` are the positions of the tokens that are drawn.

        `logits_SV` is float32 and not changed. Never waits for the device.
        """
        active = [processor for processor in self._processors if processor.is_active(rows, positions)]
        processed_SV = logits_SV.clone() if active else logits_SV
        for processor in active:
            processor.apply(processed_SV, rows, positions)
        tokens_S = self._choose(processed_SV, rows, positions)
        for processor in active:
            processor.accept(tokens_S, rows)
        return self._report(logits_SV, tokens_S, rows)

    def _upload(self, values: Ints) -> torch.Tensor:
        return upload(values, self._device)

    def _choose(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> torch.Tensor:
        """[S]: the best token of greedy rows, a draw for the others; filtered rows separately, in bounded slices."""
        tokens_S = logits_SV.argmax(-1)
        filtered = self.table.uses_filters(rows)
        random = self.table.temperature[rows] > 0.0
        size = max(1, SLICE_ELEMENTS // logits_SV.shape[1])
        for chosen, filters_apply in ((random & ~filtered, False), (random & filtered, True)):
            where = np.nonzero(chosen)[0]
            for begin in range(0, len(where), size):
                part = where[begin : begin + size]
                index = self._upload(part)
                tokens_S[index] = self._draw(logits_SV[index], rows[part], positions[part], filters_apply)
        return tokens_S

    def _draw(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints, filters_apply: bool) -> torch.Tensor:
        table = self.table
        logits_SV = logits_SV / upload(table.temperature[rows], self._device)[:, None]
        if filters_apply:
            kept_SV = filters.keep(logits_SV, table.top_k[rows], table.top_p[rows], table.min_p[rows])
            logits_SV = logits_SV.masked_fill(~kept_SV, float("-inf"))
        u_S = uniforms(self._upload(table.seed[rows]), self._upload(positions))
        return inverse_cdf(logits_SV, u_S)

    def _report(self, logits_SV: torch.Tensor, tokens_S: torch.Tensor, rows: Ints) -> Sampled:
        """Adds the log-probabilities that rows asked for."""
        reported = np.nonzero(self.table.logprobs[rows] >= 0)[0]
        if not len(reported):
            return Sampled(tokens_S, None, [], [])
        widths = self.table.logprobs[rows[reported]].tolist()
        index = self._upload(reported)
        gathered = logprobs.gather(logits_SV[index], tokens_S[index], max(widths))
        return Sampled(tokens_S, gathered, reported.tolist(), widths)
