"""The input of one step's forward: flat tokens and positions, and the metadata that the backends planned.

Does not depend on rows, chunks or requests. Legend: T tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """The input of one step's forward.

    tokens_T     [T] int64
    positions_T  [T] int64, each token's position in its row
    attention    the result of AttentionBackend.plan
    lora         the result of LoraBackend.plan, None for a step without adapters
    lanes_T      [T] on the host, each token's lane, if an adapter of the step adapts experts or has a full embedding,
                 which are computed lane by lane; else None
    norm_lanes_T [T] int64, each token's lane, if an adapter of the step has its own norms; else None
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    attention: Any
    lora: Any = None
    lanes_T: NDArray[np.int32] | None = None
    norm_lanes_T: torch.Tensor | None = None
