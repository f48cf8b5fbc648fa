"""The small operations on a CPU: compiled functions where there are any by now, else plain torch."""

from __future__ import annotations

import torch
from msgspec.structs import replace

from model_runner.arch import Arch
from model_runner.compiled.found import Found
from model_runner.compiled.kernels import Kernels
from model_runner.compiled.program import Function
from model_runner.device import dtype_name
from model_runner.ops.base import HeadNorms, NormKind
from model_runner.ops.torch_ops import TorchOps

FEW = 8
"""So many tokens are computed by one thread alone."""


class CompiledOps(TorchOps):
    """What is compiled: the plain norm behind a sum, the SiLU gate, and rotation with storing."""

    def __init__(self) -> None:
        self._found = Found()

    def use(self, kernels: Kernels) -> None:
        self._found.use(kernels)

    def functions(self, arch: Arch, dtype: torch.dtype) -> list[Function]:
        name, found = dtype_name(dtype), []
        if arch.norm == "plain":
            found.append(Function("add_norm", (arch.hidden_size,), name, (arch.norm_eps,)))
        if arch.activation == "silu":
            found.append(Function("silu_mul", (arch.intermediate_size,), name))
        if not arch.qk_norm:
            turned = {rope.turned(arch.head_dim) // 2 for rope in arch.ropes if rope is not None}
            heads = arch.num_heads, arch.num_kv_heads, arch.head_dim
            found += [Function("rope_and_store", (*heads, half), name) for half in sorted(turned)]
        return [replace(function, threads=threads) for function in found for threads in (1, 0)]

    def add_norm(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        kind: NormKind = "plain",
        lanes_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if kind == "plain" and lanes_T is None:
            kernel = self._found.get("add_norm", (x_TH.shape[1],), x_TH.dtype, (eps,), _threads(x_TH))
            if kernel is not None:
                normed_TH, total_TH = kernel([x_TH.contiguous(), residual_TH.contiguous(), weight_H])
                return normed_TH, total_TH
        return super().add_norm(x_TH, residual_TH, weight_H, eps, kind, lanes_T)

    def silu_mul(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        kernel = self._found.get("silu_mul", (gate_up_TJ.shape[1] // 2,), gate_up_TJ.dtype, (), _threads(gate_up_TJ))
        return super().silu_mul(gate_up_TJ) if kernel is None else kernel([gate_up_TJ.contiguous()])[0]

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
        if norms is None:
            (_, joint, size), kv_heads = qkv_TJD.shape, k_cache_PSKD.shape[2]
            sizes = joint - 2 * kv_heads, kv_heads, size, cos_T1E.shape[-1]
            kernel = self._found.get("rope_and_store", sizes, qkv_TJD.dtype, (), _threads(qkv_TJD))
            if kernel is not None:
                caches = (cache.view(-1, kv_heads, size) for cache in (k_cache_PSKD, v_cache_PSKD))
                return kernel([qkv_TJD.contiguous(), cos_T1E, sin_T1E, *caches, slots_T.long()])[0]
        return super().rope_and_store(qkv_TJD, cos_T1E, sin_T1E, k_cache_PSKD, v_cache_PSKD, slots_T, norms)


def _threads(x_T: torch.Tensor) -> int:
    """A few tokens are done before a second thread has heard of them; 0: as many as there are."""
    return 1 if len(x_T) <= FEW else 0
