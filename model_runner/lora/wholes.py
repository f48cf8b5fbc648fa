"""Whole matrices that adapters bring in the place of the base's: the embedding and the head, a slot an adapter.

    y = y + sum over the lane's slots  scale * (answer of the slot's matrix - answer of the base's)

With scale 1 and no delta beside it that is the slot's own answer. Such rows are computed by lane, outside of recorded
steps: the matrices are large, and few adapters have one. Knows nothing of steps. Legend: T tokens, O out features,
n rows of one lane.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from model_runner.lora.pages import RankPages
from model_runner.lora.site import Site, whole_of

Answer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(a weight like the site's, the inputs of n rows) -> [n, O]."""


def replace_rows(
    y_TO: torch.Tensor, x: torch.Tensor, site: Site, pages: RankPages, lanes_T: NDArray[np.int32], answer: Answer
) -> None:
    """Changes the rows of lanes that have matrices of their own at this site, in place."""
    slots = pages.wholes.get(site.name)
    if slots is None:
        return
    for lane in np.unique(lanes_T).tolist():
        pairs = pages.lanes.get(lane, {}).get(whole_of(site.group), ())
        if pairs:
            rows_n = torch.from_numpy(np.flatnonzero(lanes_T == lane)).to(y_TO.device)
            x_n, y_nO = x[rows_n], y_TO[rows_n].float()
            base_nO = answer(site.weight, x_n).float()
            for slot, scale in pairs:
                y_nO += scale * (answer(slots[slot], x_n).float() - base_nO)
            y_TO[rows_n] = y_nO.to(y_TO.dtype)
