"""Rotary position embedding: angles from positions once a step, applied to heads in every layer.

Legend: T tokens, N heads, D head size, E dimensions of a head that are turned, the first ones. Dimension i < E/2 is
paired with dimension i + E/2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from model_runner.rope import Rope, inverse_frequencies


class Rotation(NamedTuple):
    """cos and sin of a step's angles, [T, 1, E/2], in the model's dtype."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, x_TND: torch.Tensor) -> torch.Tensor:
        """Each pair of dimensions turned by its angle: [T, N, D]."""
        half = self.cos.shape[-1]
        first, second, still = x_TND[..., :half], x_TND[..., half : 2 * half], x_TND[..., 2 * half :]
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat((*turned, still) if still.shape[-1] else turned, dim=-1)


class Rotary:
    """The frequencies of one model's layers, or of some of them."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._scale = rope.attention
        self._dtype = dtype

    def __call__(self, positions_T: torch.Tensor) -> Rotation:
        """The rotation of each token, computed in float32."""
        angles = (positions_T.float()[:, None] * self._frequencies)[:, None, :]
        return Rotation((angles.cos() * self._scale).to(self._dtype), (angles.sin() * self._scale).to(self._dtype))
