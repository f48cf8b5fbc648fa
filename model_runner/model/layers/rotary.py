"""Rotary position embedding: the angles of a step's positions, computed once in a step for all layers.

Legend: T tokens, E the number of rotated dimensions of a head, which are its first ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from model_runner.config.rope import Rope, inverse_frequencies


class Rotation(NamedTuple):
    """The cos and sin of a step's angles, each [T, 1, E/2] in the model's dtype."""

    cos: torch.Tensor
    sin: torch.Tensor


class Rotary:
    """The frequencies of one rope, shared by the layers that have this rope."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._scale = rope.attention
        self._dtype = dtype

    def __call__(self, positions_T: torch.Tensor) -> Rotation:
        """Returns the rotation of each token; the angles are computed in float32."""
        angles = (positions_T.float()[:, None] * self._frequencies)[:, None, :]
        return Rotation((angles.cos() * self._scale).to(self._dtype), (angles.sin() * self._scale).to(self._dtype))
