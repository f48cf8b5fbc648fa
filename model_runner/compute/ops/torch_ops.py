"""The small operations in plain torch, on any device: the reference, bit-equal to transformers."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, silu

from model_runner.compute.ops.base import HeadNorms, NormKind, Ops


class TorchOps(Ops):
    """The operations as calls of torch functions."""

    def norm(
        self,
        x: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        kind: NormKind = "plain",
        lanes_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if lanes_T is not None:
            weight_H = weight_H[lanes_T] if x.dim() == 2 else weight_H[lanes_T][:, None]
        x_float = x.float()
        scaled = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)
        if kind == "plain":
            return weight_H * scaled.to(x.dtype)
        weight = weight_H.float() if kind == "wide" else 1.0 + weight_H.float()
        return (weight * scaled).to(x.dtype)

    def add_norm(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        kind: NormKind = "plain",
        lanes_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual_TH + x_TH
        return self.norm(total, weight_H, eps, kind, lanes_T), total

    def silu_mul(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_TJ.chunk(2, dim=-1)
        return silu(gate) * up

    def gelu_tanh_mul(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_TJ.chunk(2, dim=-1)
        return gelu(gate, approximate="tanh") * up

    def rope(self, x_TND: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
        half = cos_T1E.shape[-1]
        first, second, unrotated = x_TND[..., :half], x_TND[..., half : 2 * half], x_TND[..., 2 * half :]
        rotated = (first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E)
        return torch.cat((*rotated, unrotated) if unrotated.shape[-1] else rotated, dim=-1)

    def rope_and_store(
        self,
        qkv_TJD: torch.Tensor,
        cos_T1E: torch.Tensor,
        sin_T1E: torch.Tensor,
        k_cache_PSKD: torch.Tensor,
        v_cache_PSKD: torch.Tensor,
        slots_T: torch.Tensor,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        kv_heads = k_cache_PSKD.shape[2]
        qk, v = qkv_TJD[:, :-kv_heads], qkv_TJD[:, -kv_heads:]
        q, k = qk[:, :-kv_heads], qk[:, -kv_heads:]
        if norms is not None:
            q = self.norm(q, norms.q_weight_D, norms.eps, norms.kind, norms.lanes_T)
            k = self.norm(k, norms.k_weight_D, norms.eps, norms.kind, norms.lanes_T)
        k_cache_PSKD.flatten(0, 1).index_copy_(0, slots_T.long(), self.rope(k, cos_T1E, sin_T1E))
        v_cache_PSKD.flatten(0, 1).index_copy_(0, slots_T.long(), v)
        return self.rope(q, cos_T1E, sin_T1E)
