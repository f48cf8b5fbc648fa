"""The interface of the operations between matmuls (norm, gate, rotary embedding, KV store), and a table of backends.

`kind` of a norm: plain = weight * cast(x / rms), wide = cast(weight * x / rms), gemma = cast((1 + weight) * x / rms).
The weight may be a table with a row for each lane; `lanes_T` then has each token's lane, else it is None.

Legend: T tokens, L lanes, H hidden size, I inner size, N query heads, K key/value heads, J = N + 2 K, D head size,
E rotated elements of a head, P pages, S page size.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch

from model_runner.compute.kernels.cpu.kernel_user import KernelUser

BACKENDS = {
    "cpu": "model_runner.compute.ops.cpu_ops:CpuOps",
    "triton": "model_runner.compute.ops.triton_ops:TritonOps",
}

NormKind = Literal["plain", "wide", "gemma"]


class HeadNorms(NamedTuple):
    """The norms of q and k over each head. The weights are [D], or tables [L, D] if `lanes_T` is given."""

    q_weight_D: torch.Tensor
    k_weight_D: torch.Tensor
    eps: float
    kind: NormKind = "plain"
    lanes_T: torch.Tensor | None = None


class Ops(KernelUser, ABC):
    """A backend of these operations. Results are new tensors; only `rope_and_store` also writes to the caches."""

    @abstractmethod
    def norm(
        self,
        x: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        kind: NormKind = "plain",
        lanes_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the RMSNorm of x, [T, H] or [T, N, H], over the last dimension.

        The weight is [H], or [L, H] if `lanes_T` is given.
        """

    @abstractmethod
    def add_norm(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        kind: NormKind = "plain",
        lanes_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (the norm of residual + x, residual + x)."""

    @abstractmethod
    def silu_mul(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        """Returns silu(gate) * up, [T, I]; the input [T, 2 I] is gate and up side by side."""

    @abstractmethod
    def gelu_tanh_mul(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        """Returns gelu(gate) * up, [T, I], in gelu's tanh form; the input [T, 2 I] is gate and up side by side."""

    @abstractmethod
    def rope(self, x_TND: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
        """Returns x [T, N, D] with element i < E/2 of each head rotated with element i + E/2.

        cos and sin are [T, 1, E/2].
        """

    @abstractmethod
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
        """Returns q [T, N, D], normed and rotated; stores k, normed and rotated, and v at their slots of the caches."""


def create(device: torch.device) -> Ops:
    """Returns the Triton backend on CUDA, the CPU backend elsewhere."""
    module, _, attribute = BACKENDS["triton" if device.type == "cuda" else "cpu"].partition(":")
    ops: Ops = getattr(importlib.import_module(module), attribute)()
    return ops
