"""What one step's forward is handed: flat tokens and positions, and the metadata the backends planned.

Knows nothing of rows, chunks or requests. Legend: T tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """One step on the device.

    tokens_T     [T] int64
    positions_T  [T] int64, each token's position in its row
    attention    what AttentionBackend.plan returned
    lora         what LoraBackend.plan returned, None for a step of the base alone
    lanes_T      [T] on the host, each token's lane, where one touches experts or brings a whole embedding: these are
                 computed by lane; else None
    norm_lanes_T [T] int64, each token's lane, where one may have norms of its own; else None
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    attention: Any
    lora: Any = None
    lanes_T: NDArray[np.int32] | None = None
    norm_lanes_T: torch.Tensor | None = None
