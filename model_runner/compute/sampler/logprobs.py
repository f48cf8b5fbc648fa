"""Log-probabilities of tokens and of the best alternatives: log-softmax of the model's own logits, natural logarithm.

They are computed on the device, and later turned into messages on the host. Legend: S positions, V vocabulary,
K alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.messages import LogprobIds
from model_runner.platform.device import download


@dataclass(frozen=True)
class Logprobs:
    """The log-probabilities of S positions: of the chosen tokens [S] and of the K best [S, K]."""

    tokens_S: torch.Tensor
    chosen_S: torch.Tensor
    top_ids_SK: torch.Tensor
    top_SK: torch.Tensor

    def on_host(self) -> Logprobs:
        """Starts a copy to the host and returns it."""
        parts = (self.tokens_S, self.chosen_S, self.top_ids_SK, self.top_SK)
        return Logprobs(*(download(part) for part in parts))

    def messages(self, widths: list[int]) -> list[LogprobIds]:
        """Returns one message per position, with `widths[i]` alternatives at position i.

        Call it on the copy from `on_host`, when that copy is done.
        """
        tokens, chosen = self.tokens_S.tolist(), self.chosen_S.tolist()
        ids, values = self.top_ids_SK.tolist(), self.top_SK.tolist()
        return [
            LogprobIds(token, value, _ordered(row_ids, row_values)[:width])
            for token, value, row_ids, row_values, width in zip(tokens, chosen, ids, values, widths, strict=True)
        ]


def _ordered(ids: list[int], values: list[float]) -> list[tuple[int, float]]:
    return sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))


def gather(logits_SV: torch.Tensor, tokens_S: torch.Tensor, top: int) -> Logprobs:
    """Returns the log-probabilities of `tokens_S` and of the `top` best tokens (at most V) under `logits_SV`."""
    logprobs_SV = torch.log_softmax(logits_SV.float(), dim=-1)
    best = logprobs_SV.topk(min(top, logits_SV.shape[1]), dim=-1)
    chosen_S = logprobs_SV.gather(1, tokens_S[:, None])[:, 0]
    return Logprobs(tokens_S, chosen_S, best.indices, best.values)
