"""The sampler: draws one token per row from a step's logits, in the order of operations of the package's docstring.

Work is done only for the rows that need it: a greedy batch without logits processors is one argmax. Does not name any
logits processor. Legend: S rows that sample, V vocabulary.
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

SLICE_ELEMENTS = 1 << 24  # the most logits drawn from at once; their float64 cumulated sums are 128 MiB


@dataclass(frozen=True)
class Sampled:
    """The result of sampling a step, on the device: tokens [S], and log-probabilities of the rows that report them.

    `reported` are the indices of these rows among the step's sampling rows, `widths` their numbers of alternatives.
    """

    tokens_S: torch.Tensor
    logprobs: logprobs.Logprobs | None
    reported: list[int]
    widths: list[int]

    def on_host(self) -> Sampled:
        """Starts a copy to the host and returns it."""
        copied = None if self.logprobs is None else self.logprobs.on_host()
        return Sampled(download(self.tokens_S), copied, self.reported, self.widths)

    def messages(self) -> dict[int, LogprobIds]:
        """Returns the reported log-probabilities by index among the step's sampling rows.

        Call it on the copy from `on_host`, when that copy is done.
        """
        if self.logprobs is None:
            return {}
        return dict(zip(self.reported, self.logprobs.messages(self.widths), strict=True))


class Sampler:
    """Draws tokens for the rows of one runner. A step has at most `vocab_size` logits per row.

    `processors` are applied in their order; None: all processors of the registry.
    """

    def __init__(
        self, rows: int, vocab_size: int, device: torch.device, processors: Sequence[LogitsProcessor] | None = None
    ) -> None:
        self._rows = rows
        self._device = device
        self._processors = create_all(rows, vocab_size, device) if processors is None else list(processors)
        self.table = ParameterTable(rows)

    def begin(self, new: NewRow) -> None:
        """Replaces the parameters of row `new.row` by those of the request that holds the row from now on."""
        self.table.begin(new)
        for processor in self._processors:
            processor.end(new.row)
            processor.begin(new)

    def reset(self) -> None:
        """Clears the parameters of all rows."""
        self.table = ParameterTable(self._rows)
        for processor in self._processors:
            processor.reset()

    def sample(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> Sampled:
        """Draws one token for each of `rows`; `positions` are the positions of the tokens that are drawn.

        `logits_SV` is float32 and is not changed. Does not wait for the device.
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
        """Returns [S]: the best token of each greedy row, and a draw for each other row.

        Rows with filters are drawn apart from those without, and both in slices of about SLICE_ELEMENTS logits.
        """
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
        """Returns the tokens, with the log-probabilities of the rows that report them."""
        reported = np.nonzero(self.table.logprobs[rows] >= 0)[0]
        if not len(reported):
            return Sampled(tokens_S, None, [], [])
        widths = self.table.logprobs[rows[reported]].tolist()
        index = self._upload(reported)
        asked = [self.table.asked.get(int(row), []) for row in rows[reported]] if self.table.asked else []
        gathered = logprobs.gather(logits_SV[index], tokens_S[index], max(widths), asked)
        return Sampled(tokens_S, gathered, reported.tolist(), widths)
