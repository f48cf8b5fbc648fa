"""Full weights that adapters bring in the place of the base's embedding or head, one slot per adapter.

    y = y + sum over the lane's slots  scale * (output of the slot's weight - output of the base's)

With one slot of scale 1 and no other delta, y is the slot's output. A weight of another vocabulary than the base's must
be the only one in its lane: its output replaces y, and the logits of a row end where the row's vocabulary does:

    row of the base             | 0 .. 319 | -inf          |      as wide as the largest vocabulary in the step
    row of 330 tokens           | 0 .. 319 | 320 .. 329    |
    row of 300 tokens           | 0 .. 299 | -inf | -inf   |

These rows are computed lane by lane, outside captured steps: the weights are large, and few adapters have one.

Legend: T tokens, O out features, n rows of one lane, S rows of the head, V columns of logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.pool.site_pools import FullWeightPool
from model_runner.lora.site import Site, full_weights_of
from model_runner.platform.device import upload

LaneIndices = NDArray[np.int32]
"""The lane of each row."""


def vocabularies(site: Site, pages: RankPagePool, lanes_S: LaneIndices) -> NDArray[np.int64]:
    """Returns the size of the vocabulary of each row's lane, [S]."""
    pool, group = pages.full_weights.get(site.name), full_weights_of(site.group)
    sizes_S = np.full(len(lanes_S), site.vocabulary)
    if pool is None:
        return sizes_S
    for lane in np.unique(lanes_S).tolist():
        for slot, _ in pages.lanes.get(lane, {}).get(group, ()):
            sizes_S[lanes_S == lane] = pool.vocab_S[slot]
    return sizes_S


def replace_rows(y_TO: torch.Tensor, x: torch.Tensor, site: Site, pages: RankPagePool, lanes_T: LaneIndices) -> None:
    """Changes the rows of lanes that have full weights of this site, in place.

    The y of a head may be wider than the base's vocabulary; its first columns are the base's output.
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
            own_nO = _answer(site, pool.weight(pairs[0][0]), x_n)
            y_TO[rows_n, : own_nO.shape[1]] = own_nO
        else:
            y_nO = y_TO[rows_n, : site.out_features].float()
            _add_changes(y_nO, x_n, site, pool, pairs)
            y_TO[rows_n, : site.out_features] = y_nO.to(y_TO.dtype)


def pad_vocabulary(y_SV: torch.Tensor, vocab_S: NDArray[np.int64]) -> torch.Tensor:
    """Returns y with a column for every token of the largest vocabulary. The values of new columns are undefined."""
    more = int(vocab_S.max(initial=0)) - y_SV.shape[1]
    return functional.pad(y_SV, (0, more)) if more > 0 else y_SV


def mask_beyond_vocabulary(logits_SV: torch.Tensor, vocab_S: NDArray[np.int64]) -> None:
    """Writes -inf, in place, into the columns beyond each row's own vocabulary."""
    columns = logits_SV.shape[1]
    if (vocab_S < columns).any():
        ends_S1 = upload(vocab_S, logits_SV.device)[:, None]
        beyond_SV = torch.arange(columns, device=logits_SV.device)[None] >= ends_S1
        logits_SV.masked_fill_(beyond_SV, float("-inf"))


def _add_changes(
    y_nO: torch.Tensor, x_n: torch.Tensor, site: Site, pool: FullWeightPool, pairs: Sequence[tuple[int, float]]
) -> None:
    """Adds scale * (the slot's output - the base's) for each slot, in float32, in place."""
    base_nO = _base_answer(site, x_n).float()
    for slot, scale in pairs:
        y_nO += scale * (_answer(site, pool.weight(slot), x_n).float() - base_nO)


def _base_answer(site: Site, x_n: torch.Tensor) -> torch.Tensor:
    """Returns the output of the base's weight, [n, O]."""
    return functional.embedding(x_n, site.base.dequantize()) if site.embeds else site.base.apply(x_n)


def _answer(site: Site, weight: torch.Tensor, x_n: torch.Tensor) -> torch.Tensor:
    """Returns the output of `weight` in the place of the base's weight, [n, O]."""
    return functional.embedding(x_n, weight) if site.embeds else functional.linear(x_n, weight)
