"""Log-probabilities of tokens and of the best alternatives: log-softmax of the model's own logits, natural logarithm.

They are computed on the device, and later turned into messages on the host. Legend: S positions, V vocabulary,
K alternatives, A tokens that are reported in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.messages import LogprobIds
from model_runner.platform.device import download, upload


@dataclass(frozen=True)
class Logprobs:
    """The log-probabilities of S positions: of the chosen tokens [S], of the K best [S, K], and of asked ones [S, A].

    `asked` are how many of the A each position has.
    """

    tokens_S: torch.Tensor
    chosen_S: torch.Tensor
    top_ids_SK: torch.Tensor
    top_SK: torch.Tensor
    asked_SA: torch.Tensor | None = None
    asked: Sequence[int] = ()

    def on_host(self) -> Logprobs:
        """Starts a copy to the host and returns it."""
        return Logprobs(
            download(self.tokens_S),
            download(self.chosen_S),
            download(self.top_ids_SK),
            download(self.top_SK),
            None if self.asked_SA is None else download(self.asked_SA),
            self.asked,
        )

    def messages(self, widths: list[int]) -> list[LogprobIds]:
        """Returns one message per position, with `widths[i]` alternatives at position i.

        Call it on the copy from `on_host`, when that copy is done.
        """
        tokens, chosen = self.tokens_S.tolist(), self.chosen_S.tolist()
        ids, values = self.top_ids_SK.tolist(), self.top_SK.tolist()
        asked = [[]] * len(tokens) if self.asked_SA is None else self.asked_SA.tolist()
        counts = self.asked or [0] * len(tokens)
        rows = zip(tokens, chosen, ids, values, widths, asked, counts, strict=True)
        return [
            LogprobIds(token, value, _ordered(row_ids, row_values)[:width], row_asked[:count])
            for token, value, row_ids, row_values, width, row_asked, count in rows
        ]


def _ordered(ids: list[int], values: list[float]) -> list[tuple[int, float]]:
    return sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))


def gather(logits_SV: torch.Tensor, tokens_S: torch.Tensor, top: int, asked: Sequence[Sequence[int]] = ()) -> Logprobs:
    """Returns the log-probabilities of `tokens_S` and of the `top` best tokens (at most V) under `logits_SV`.

    `asked` are further tokens of each position, or nothing where no position has any.
    """
    logprobs_SV = torch.log_softmax(logits_SV.float(), dim=-1)
    best = logprobs_SV.topk(min(top, logits_SV.shape[1]), dim=-1)
    chosen_S = logprobs_SV.gather(1, tokens_S[:, None])[:, 0]
    found = Logprobs(tokens_S, chosen_S, best.indices, best.values)
    counts = [*map(len, asked)]
    if not any(counts):
        return found
    padded = [[*ids, *[0] * (max(counts) - len(ids))] for ids in asked]
    ids_SA = upload(np.array(padded, np.int64), logits_SV.device).clamp(max=logits_SV.shape[1] - 1)
    return replace(found, asked_SA=logprobs_SV.gather(1, ids_SA), asked=counts)
