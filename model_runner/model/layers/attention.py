"""Self-attention with grouped key/value heads: fused qkv, optional norm of q and k, rotation, the backend, o.

Where the backend gives the step's KV slots, everything between qkv and attention is one operation (first line):

    qkv -> norm of heads, rotation, K and V to their slots -> q -> attend_stored -> o
    qkv -> norm -> rotation -> q, k, v -> attend -> o          else, and in layers without a rotation

Legend: T tokens, H hidden size, N query heads, K key/value heads, J = N + 2 K, D head size; all on this rank.
"""

from __future__ import annotations

import torch

from model_runner.compute.attention.base import AttentionBackend
from model_runner.compute.ops.base import HeadNorms
from model_runner.config import ModelConfig
from model_runner.model.layers.linear import column_linear, row_linear
from model_runner.model.layers.norm import RMSNorm, read_norm
from model_runner.model.layers.rotary import Rotation
from model_runner.model.layers.weights import Weights
from model_runner.step.batch import Batch


class Attention:
    """One layer's attention; `attach` sets its backend and its part of the KV cache."""

    norms_by_head = True  # whether the norms of q and k are over one head at a time

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        path, size = f"model.layers.{layer}.self_attn", config.head_dim
        self.heads = weights.shard.share(config.num_heads, "attention heads")
        self.kv_heads = weights.shard.share(config.num_kv_heads, "key/value heads")
        self.head_dim = size
        self.scale = config.scale
        self.cap = config.attention_cap
        self.window = config.windows[layer]
        self.ops = weights.ops
        outs = {
            "q_proj": config.num_heads * size,
            "k_proj": config.num_kv_heads * size,
            "v_proj": config.num_kv_heads * size,
        }
        self.qkv = column_linear(
            weights,
            f"layers.{layer}.qkv",
            path,
            layer,
            "qkv",
            outs,
            config.hidden_size,
            bias=config.qkv_bias,
            fused="qkv_proj" if config.fused else None,
        )
        self.o = row_linear(
            weights,
            f"layers.{layer}.o",
            path,
            layer,
            "o",
            "o_proj",
            outs["q_proj"],
            config.hidden_size,
            bias=config.o_bias,
        )
        self.norms = self.read_norms(config, weights, path) if config.qk_norm else None

    def read_norms(self, config: ModelConfig, weights: Weights, path: str) -> tuple[RMSNorm, RMSNorm]:
        """Creates the norms of q and k, each over one head at a time."""
        q_norm, k_norm = (read_norm(config, weights, f"{path}.{which}_norm", config.head_dim) for which in "qk")
        return q_norm, k_norm

    def attach(self, backend: AttentionBackend, cache: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Sets the attention backend and this layer's cache of K and V."""
        self.backend = backend
        self.cache = cache

    def __call__(self, x_TH: torch.Tensor, rotate: Rotation | None, batch: Batch) -> torch.Tensor:
        """Computes the attention's output: [T, H] -> [T, H]. `rotate` None: a layer without rotary embedding."""
        qkv_TJD = self.qkv(x_TH, batch).reshape(len(x_TH), self.heads + 2 * self.kv_heads, self.head_dim)
        slots = self.backend.slots(batch.attention)
        if slots is None or rotate is None or not self.norms_by_head:
            mixed_TND = self._attend(qkv_TJD, rotate, batch)
        else:
            q_TND = self.ops.rope_and_store(qkv_TJD, *rotate, *self.cache, slots, self._head_norms(batch))
            mixed_TND = self.backend.attend_stored(
                q_TND, *self.cache, batch.attention, scale=self.scale, window=self.window, softcap=self.cap
            )
        return self.o(mixed_TND.flatten(1), batch)

    def _attend(self, qkv_TJD: torch.Tensor, rotate: Rotation | None, batch: Batch) -> torch.Tensor:
        first_v = self.heads + self.kv_heads
        qk, v = qkv_TJD[:, :first_v], qkv_TJD[:, first_v:]
        if self.norms is not None:
            qk = self.norm(qk, *self.norms, batch)
        if rotate is not None:
            qk = self.ops.rope(qk, *rotate)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        return self.backend.attend(
            q, k, v, *self.cache, batch.attention, scale=self.scale, window=self.window, softcap=self.cap
        )

    def norm(self, qk_TND: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm, batch: Batch) -> torch.Tensor:
        """Norms each head of q and k, which are side by side in `qk_TND`."""
        return torch.cat((q_norm(qk_TND[:, : self.heads], batch), k_norm(qk_TND[:, self.heads :], batch)), dim=1)

    def _head_norms(self, batch: Batch) -> HeadNorms | None:
        if self.norms is None:
            return None
        q_norm, k_norm = self.norms
        return HeadNorms(q_norm.weights(batch), k_norm.weights(batch), q_norm.eps, q_norm.kind, batch.norm_lanes_T)
