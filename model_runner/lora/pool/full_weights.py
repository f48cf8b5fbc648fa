"""Whole matrices that adapters bring in the place of the base's: the embedding and the head, a slot an adapter.

    y = y + sum over the lane's slots  scale * (answer of the slot's matrix - answer of the base's)

With scale 1 and no delta beside it that is the slot's own answer. A matrix of another vocabulary than the base's stands
alone in its lane: its answer is taken as it is, and the logits of a row end where its vocabulary does:

    row of the base             | 0 .. 319 | -inf          |      as wide as the widest vocabulary in the step
    row of 330 tokens           | 0 .. 319 | 320 .. 329    |
    row of 300 tokens           | 0 .. 299 | -inf | -inf   |

Such rows are computed by lane, outside of recorded steps: the matrices are large, and few adapters have one. Knows
nothing of steps. Legend: T tokens, O out features, n rows of one lane, S rows of the head, V columns of logits.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import Site, full_weights_of
from model_runner.platform.device import upload

Lanes = NDArray[np.int32]


def vocabularies(site: Site, pages: RankPagePool, lanes_S: Lanes) -> NDArray[np.int64]:
    """[S]: how many tokens the vocabulary of each row's lane has."""
    pool, group = pages.full_weights.get(site.name), full_weights_of(site.group)
    found = np.full(len(lanes_S), site.vocabulary)
    for lane in np.unique(lanes_S).tolist() if pool is not None else []:
        for slot, _ in pages.lanes.get(lane, {}).get(group, ()):
            assert pool is not None
            found[lanes_S == lane] = pool.vocab_S[slot]
    return found


def replace_rows(y_TO: torch.Tensor, x: torch.Tensor, site: Site, pages: RankPagePool, lanes_T: Lanes) -> None:
    """Changes the rows of lanes that have matrices of their own at this site, in place.

    Of a head's y, the first columns are the base's.
    """
    pool = pages.full_weights.get(site.name)
    if pool is None:
        return
    for lane in np.unique(lanes_T).tolist():
        pairs = pages.lanes.get(lane, {}).get(full_weights_of(site.group), ())
        if not pairs:
            continue
        rows_n = torch.from_numpy(np.flatnonzero(lanes_T == lane)).to(y_TO.device)
        x_n = x[rows_n]
        if any(pool.vocab_S[slot] != site.vocabulary for slot, _ in pairs):
            assert [scale for _, scale in pairs] == [1.0], f"lane {lane} mixes vocabularies"
            own_nO = _answer(site, pool.matrix(pairs[0][0]), x_n)
            y_TO[rows_n, : own_nO.shape[1]] = own_nO
            continue
        y_nO = y_TO[rows_n, : site.out_features].float()
        base_nO = _base_answer(site, x_n).float()
        for slot, scale in pairs:
            y_nO += scale * (_answer(site, pool.matrix(slot), x_n).float() - base_nO)
        y_TO[rows_n, : site.out_features] = y_nO.to(y_TO.dtype)


def _base_answer(site: Site, x_n: torch.Tensor) -> torch.Tensor:
    """[n, O]: what the base answers."""
    return functional.embedding(x_n, site.base.dequantize()) if site.embeds else site.base.apply(x_n)


def _answer(site: Site, matrix: torch.Tensor, x_n: torch.Tensor) -> torch.Tensor:
    """[n, O]: what a matrix in the place of the base's answers."""
    return functional.embedding(x_n, matrix) if site.embeds else functional.linear(x_n, matrix)


def widen(y_SV: torch.Tensor, vocab_S: NDArray[np.int64]) -> torch.Tensor:
    """y with a column for every token of the largest vocabulary; what is new holds nothing that counts."""
    more = int(vocab_S.max(initial=0)) - y_SV.shape[1]
    return functional.pad(y_SV, (0, more)) if more > 0 else y_SV


def close(logits_SV: torch.Tensor, vocab_S: NDArray[np.int64]) -> None:
    """No row can have a token beyond its own vocabulary: -inf there, in place."""
    columns = logits_SV.shape[1]
    if (vocab_S < columns).any():
        ends_S1 = upload(vocab_S, logits_SV.device)[:, None]
        beyond_SV = torch.arange(columns, device=logits_SV.device)[None] >= ends_S1
        logits_SV.masked_fill_(beyond_SV, float("-inf"))
