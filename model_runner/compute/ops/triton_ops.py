"""The small operations as triton kernels, one launch each; rope_and_store with its head norms is one launch too."""

from __future__ import annotations

import torch

from model_runner.compute.kernels.triton import gated, norm, rope
from model_runner.compute.ops.base import HeadNorms, NormKind, Ops


class TritonOps(Ops):
    """The operations as triton kernels.

    Inputs may be slices of a wider tensor: rows at any stride, the elements of a row contiguous.
    """

    def norm(
        self,
        x: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        kind: NormKind = "plain",
        lanes_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return norm.norm(x, weight_H, eps, kind, lanes=lanes_T)[0]

    def add_norm(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        kind: NormKind = "plain",
        lanes_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return norm.norm(x_TH, weight_H, eps, kind, residual_TH, lanes_T)

    def silu_mul(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        return gated.gated(gate_up_TJ, gelu=False)

    def gelu_tanh_mul(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        return gated.gated(gate_up_TJ, gelu=True)

    def rope(self, x_TND: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
        return rope.rope(x_TND, cos_T1E, sin_T1E)

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
        return rope.rope_and_store(qkv_TJD, cos_T1E, sin_T1E, k_cache_PSKD, v_cache_PSKD, slots_T, norms)
