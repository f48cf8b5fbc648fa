"""top_k, top_p and min_p: the set of tokens that a row may draw from.

top_k and top_p each keep some number of a row's best tokens, so both together amount to one count per row, found from
sorted values. Equal logits are ranked by token id, so the set does not depend on how a device sorts. A row without
filters keeps all tokens. Legend: S rows that are filtered, V vocabulary, C best candidates, sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model_runner.platform.device import upload

CANDIDATES = (256, 4096)
"""The numbers of candidates that are tried in turn on a CPU before a whole row is sorted."""


def keep(
    logits_SV: torch.Tensor, top_k: NDArray[np.int64], top_p: NDArray[np.float64], min_p: NDArray[np.float64]
) -> torch.Tensor:
    """Returns [S, V] bool: the tokens that are kept. top_k 0, top_p 1 and min_p 0 switch the filter off.

    top_p uses the probabilities after top_k, and keeps the fewest best tokens whose sum is at least top_p. min_p
    removes the tokens whose probability is less than min_p times that of the best token, which is always kept.
    """
    vocab = logits_SV.shape[1]
    limits = np.where(top_k > 0, np.minimum(top_k, vocab), vocab)
    kept_SV = torch.ones_like(logits_SV, dtype=torch.bool)
    if (limits < vocab).any() or (top_p < 1.0).any():
        kept_SV = _keep_best(logits_SV, limits, top_p)
    if (min_p > 0.0).any():
        floor_S1 = upload(np.log(np.maximum(min_p, 1e-300)), logits_SV.device)[:, None]
        kept_SV = kept_SV & (logits_SV - logits_SV.amax(-1, keepdim=True) >= floor_S1)
    return kept_SV


def _keep_best(logits_SV: torch.Tensor, limits: NDArray[np.int64], top_p: NDArray[np.float64]) -> torch.Tensor:
    limits_S1 = upload(limits, logits_SV.device)[:, None]
    top_p_S1 = upload(top_p, logits_SV.device)[:, None]
    vocab = logits_SV.shape[1]
    widest = max(1, int(limits[(limits < vocab) | (top_p < 1.0)].max()))
    # on a GPU, checking whether the candidates suffice would wait for the device
    tries = CANDIDATES if logits_SV.device.type == "cpu" else ()
    return _keep_from_candidates(
        logits_SV, limits_S1, top_p_S1, [*(width for width in tries if width < widest), widest]
    )


def _keep_from_candidates(
    logits_SV: torch.Tensor, limits_S1: torch.Tensor, top_p_S1: torch.Tensor, widths: Sequence[int]
) -> torch.Tensor:
    """Tries the first of `widths` as the number of candidates, then the next ones for the rows that need more."""
    best_SC = _sorted_best(logits_SV, widths[0])
    counts_S1, enough_S1 = _counts(logits_SV, best_SC, limits_S1, top_p_S1)
    kept_SV = _keep_counts(logits_SV, best_SC, counts_S1)
    if len(widths) > 1 and not bool(enough_S1.all()):
        again = (~enough_S1)[:, 0]
        kept_SV[again] = _keep_from_candidates(logits_SV[again], limits_S1[again], top_p_S1[again], widths[1:])
    return kept_SV


def _sorted_best(logits_SV: torch.Tensor, width: int) -> torch.Tensor:
    if width * 4 > logits_SV.shape[1]:
        return logits_SV.sort(-1, descending=True).values[:, :width]
    return logits_SV.topk(width, dim=-1).values


def _counts(
    logits_SV: torch.Tensor, best_SC: torch.Tensor, limits_S1: torch.Tensor, top_p_S1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns [S, 1], how many best tokens are kept (V: all), and [S, 1], whether the candidates sufficed to find this
    number.
    """
    vocab, width = logits_SV.shape[1], best_SC.shape[1]
    weights_SC = torch.exp(best_SC - best_SC[:, :1])
    edges_SC = weights_SC.cumsum(-1, dtype=torch.float64)
    all_S1 = torch.exp(logits_SV - best_SC[:, :1]).sum(-1, keepdim=True, dtype=torch.float64)
    limited_S1 = edges_SC.gather(1, (limits_S1 - 1).clamp(max=width - 1))
    target_S1 = top_p_S1 * torch.where(limits_S1 < vocab, limited_S1, all_S1)
    before_SC = torch.nn.functional.pad(edges_SC[:, :-1], (1, 0))
    nucleus_S1 = (before_SC < target_S1).sum(-1, keepdim=True).clamp(min=1)
    nucleus_S1 = torch.where(top_p_S1 < 1.0, nucleus_S1, vocab)
    reached_S1 = (top_p_S1 >= 1.0) | (edges_SC[:, -1:] >= target_S1)
    enough_S1 = torch.where(limits_S1 < vocab, limits_S1 <= width, reached_S1)
    return torch.minimum(nucleus_S1, limits_S1), enough_S1


def _keep_counts(logits_SV: torch.Tensor, best_SC: torch.Tensor, counts_S1: torch.Tensor) -> torch.Tensor:
    """Returns [S, V] bool: each row's `counts` best tokens; of tokens equal to the last one kept, the lowest ids."""
    width = best_SC.shape[1]
    last_S1 = best_SC.gather(1, (counts_S1 - 1).clamp(max=width - 1))
    above_SV, equal_SV = logits_SV > last_S1, logits_SV == last_S1
    room_S1 = counts_S1 - above_SV.sum(-1, keepdim=True)
    unfiltered_S1 = counts_S1 >= logits_SV.shape[1]
    if logits_SV.device.type != "cpu" or bool((equal_SV.sum(-1, keepdim=True) > room_S1).any()):
        equal_SV &= equal_SV.cumsum(-1) <= room_S1
    return above_SV | equal_SV | unfiltered_S1
