"""The interface of the operations between matmuls (norm, gate, rotary embedding, KV store), and a table of backends.

`kind` of a norm: plain = weight * cast(x / rms), wide = cast(weight * x / rms), gemma = cast((1 + weight) * x / rms).
Its weight may be a table with a row for each lane; `lanes_T` then has the row of each token.

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
    """The norms of q and k over each head: weights [D], or tables [L, D] with the tokens' lanes."""

    q_weight_D: torch.Tensor
    k_weight_D: torch.Tensor
    eps: float
    kind: NormKind = "plain"
    lanes_T: torch.Tensor | None = None


class Ops(KernelUser, ABC):
    """Results are new tensors; only `rope_and_store` also writes to the caches."""

    @abstractmethod
    def norm(
        self,
        x: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        kind: NormKind = "plain",
        lanes_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RMSNorm over the last dimension of [T, H] or [T, N, H]. The weight is [H], or [L, H] with lanes."""

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
        """(the norm of residual + x, residual + x)."""

    @abstractmethod
    def silu_mul(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        """[T, I] from [T, 2 I]: silu(gate) * up."""

    @abstractmethod
    def gelu_tanh_mul(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        """[T, I] from [T, 2 I]: gelu(gate) * up, gelu in its tanh form."""

    @abstractmethod
    def rope(self, x_TND: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
        """[T, N, D]: element i < E/2 of each head rotated with i + E/2; cos and sin are [T, 1, E/2]."""

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
    """The Triton kernels on CUDA, the CPU backend elsewhere."""
    module, _, attribute = BACKENDS["triton" if device.type == "cuda" else "cpu"].partition(":")
    ops: Ops = getattr(importlib.import_module(module), attribute)()
    return ops
