"""Self-attention with grouped key/value heads: fused qkv, optional norm of q and k, rotation, the backend, o.

Legend: T tokens, H hidden size, N query heads, K key/value heads, D head size, all of this rank.
"""

from __future__ import annotations

import torch

from model_runner.arch import Arch
from model_runner.attention.base import AttentionBackend
from model_runner.batch import Batch
from model_runner.layers.linear import column_linear, row_linear
from model_runner.layers.norm import RMSNorm, read_norm
from model_runner.layers.rotary import Rotation
from model_runner.layers.weights import Weights


class Attention:
    """One layer's attention; `attach` gives it a backend and its cache."""

    def __init__(self, arch: Arch, layer: int, weights: Weights) -> None:
        path, size = f"model.layers.{layer}.self_attn", arch.head_dim
        self.heads = weights.shard.share(arch.num_heads, "attention heads")
        self.kv_heads = weights.shard.share(arch.num_kv_heads, "key/value heads")
        self.head_dim = size
        self.scale = arch.scale
        self.cap = arch.attention_cap
        self.window = arch.windows[layer]
        outs = {"q_proj": arch.num_heads * size, "k_proj": arch.num_kv_heads * size, "v_proj": arch.num_kv_heads * size}
        self.qkv = column_linear(
            weights,
            f"layers.{layer}.qkv",
            path,
            layer,
            "qkv",
            outs,
            arch.hidden_size,
            bias=arch.qkv_bias,
            fused="qkv_proj" if arch.fused else None,
        )
        self.o = row_linear(
            weights, f"layers.{layer}.o", path, layer, "o", "o_proj", outs["q_proj"], arch.hidden_size, bias=arch.o_bias
        )
        self.norms = self.read_norms(arch, weights, path) if arch.qk_norm else None

    def read_norms(self, arch: Arch, weights: Weights, path: str) -> tuple[RMSNorm, RMSNorm]:
        """The norms of q and k, over each head."""
        q_norm, k_norm = (read_norm(arch, weights, f"{path}.{which}_norm", arch.head_dim) for which in "qk")
        return q_norm, k_norm

    def attach(self, backend: AttentionBackend, cache: tuple[torch.Tensor, torch.Tensor]) -> None:
        """From now on `backend` attends over this layer's K and V."""
        self.backend = backend
        self.cache = cache

    def __call__(self, x_TH: torch.Tensor, rotate: Rotation | None, batch: Batch) -> torch.Tensor:
        """[T, H] -> [T, H]; without a rotation positions do not show."""
        turned = self.heads + self.kv_heads
        qkv = self.qkv(x_TH, batch).reshape(len(x_TH), turned + self.kv_heads, self.head_dim)
        qk, v = qkv[:, :turned], qkv[:, turned:]
        if self.norms is not None:
            qk = self.norm(qk, *self.norms)
        if rotate is not None:
            qk = rotate(qk)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        mixed = self.backend.attend(
            q, k, v, *self.cache, batch.attention, scale=self.scale, window=self.window, softcap=self.cap
        )
        return self.o(mixed.flatten(1), batch)

    def norm(self, qk_TND: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> torch.Tensor:
        """q and k, one after the other, each head normed."""
        return torch.cat((q_norm(qk_TND[:, : self.heads]), k_norm(qk_TND[:, self.heads :])), dim=1)
