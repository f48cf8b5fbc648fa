"""Rotary position embedding: the angles of a step's positions, computed once a step for all layers.

Legend: T tokens, E the rotary dimensions of a head, its first ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from model_runner.config.rope import Rope, inverse_frequencies


class Rotation(NamedTuple):
    """cos and sin of a step's angles, [T, 1, E/2], in the model's dtype."""

    cos: torch.Tensor
    sin: torch.Tensor


class Rotary:
    """The frequencies of the layers that have this rope."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._scale = rope.attention
        self._dtype = dtype

    def __call__(self, positions_T: torch.Tensor) -> Rotation:
        """The rotation of each token, computed in float32."""
        angles = (positions_T.float()[:, None] * self._frequencies)[:, None, :]
        return Rotation((angles.cos() * self._scale).to(self._dtype), (angles.sin() * self._scale).to(self._dtype))
