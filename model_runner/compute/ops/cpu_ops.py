"""The small operations on a CPU: C++ kernels where they are built, else plain torch."""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.spec import TOLERANCE, KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.compute.kernels.cpu.lookup import KernelLookup
from model_runner.compute.ops.base import HeadNorms, NormKind
from model_runner.compute.ops.torch_ops import TorchOps
from model_runner.config import ModelConfig
from model_runner.platform.device import dtype_name


class CpuOps(TorchOps):
    """Uses C++ kernels for add_norm with a plain norm, for silu_mul, and for rope_and_store without head norms."""

    def __init__(self) -> None:
        self._kernels = KernelLookup()

    def use_kernels(self, kernels: KernelSet) -> None:
        self._kernels.use(kernels)

    def wanted_kernels(self, config: ModelConfig, dtype: torch.dtype) -> list[KernelKey]:
        called = {
            "add_norm": config.norm == "plain",
            "silu_mul": config.activation == "silu",
            "rope_and_store": not config.qk_norm and any(rope is not None for rope in config.ropes),
        }
        return [
            KernelKey(name, dtype_name(dtype)) for name, is_called in called.items() if is_called and dtype in TOLERANCE
        ]

    def add_norm(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        kind: NormKind = "plain",
        lanes_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kernel = self._kernels.get("add_norm", x_TH.dtype) if kind == "plain" and lanes_T is None else None
        if kernel is None:
            return super().add_norm(x_TH, residual_TH, weight_H, eps, kind, lanes_T)
        normed_TH, total_TH = x_TH.new_empty(x_TH.shape), x_TH.new_empty(x_TH.shape)
        kernel(x_TH.contiguous(), residual_TH.contiguous(), weight_H, normed_TH, total_TH, *x_TH.shape, eps)
        return normed_TH, total_TH

    def silu_mul(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        kernel = self._kernels.get("silu_mul", gate_up_TJ.dtype)
        if kernel is None:
            return super().silu_mul(gate_up_TJ)
        out_TI = gate_up_TJ.new_empty(len(gate_up_TJ), gate_up_TJ.shape[1] // 2)
        kernel(gate_up_TJ.contiguous(), out_TI, *out_TI.shape)
        return out_TI

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
        kernel = self._kernels.get("rope_and_store", qkv_TJD.dtype) if norms is None else None
        if kernel is None:
            return super().rope_and_store(qkv_TJD, cos_T1E, sin_T1E, k_cache_PSKD, v_cache_PSKD, slots_T, norms)
        (tokens, joint, size), kv_heads = qkv_TJD.shape, k_cache_PSKD.shape[2]
        sizes = tokens, joint - 2 * kv_heads, kv_heads, size, cos_T1E.shape[-1]
        q_TND = qkv_TJD.new_empty(sizes[0], sizes[1], size)
        angles = cos_T1E.contiguous(), sin_T1E.contiguous()
        kernel(qkv_TJD.contiguous(), *angles, k_cache_PSKD, v_cache_PSKD, slots_T.long(), q_TND, *sizes)
        return q_TND
