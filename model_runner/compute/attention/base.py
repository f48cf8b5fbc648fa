"""The interface of attention backends, and a table of them by name.

Legend: T tokens of the step, N query heads, K key/value heads, D head size, P pages, S page size. The cache of a
layer is k and v of [P, S, K, D]; page 0 is scratch.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any

import torch

from engine.errors import ConfigError
from model_runner.compute.kernels.cpu.kernel_user import KernelUser
from model_runner.step.layout import Layout

BACKENDS = {
    "torch": "model_runner.compute.attention.torch_backend:TorchAttention",
    "triton": "model_runner.compute.attention.triton_backend:TritonAttention",
}


class AttentionBackend(KernelUser, ABC):
    """Causal attention of a step's chunks over their paged caches."""

    @abstractmethod
    def plan(self, layout: Layout, into: Any | None = None) -> Any:
        """Returns the metadata of a step, made from its layout and shared by all layers.

        `into`: metadata from `static`, which is filled in place and returned. The layout must then have exactly the
        number of chunks that `static` was called with, all of length 1.
        """

    def static(self, tokens: int) -> Any:
        """Returns metadata in buffers at fixed addresses, for captured steps of exactly `tokens` chunks of length 1."""
        raise NotImplementedError(f"{type(self).__name__} has no static buffers")

    @abstractmethod
    def attend(
        self,
        q_TND: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache_PSKD: torch.Tensor,
        v_cache_PSKD: torch.Tensor,
        meta: Any,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Stores k and v at the step's slots, then returns the attention's output [T, N, D].

        A token at position p of its row sees the row's positions max(0, p - window + 1)..p (window None: 0..p).
        With a softcap (Gemma 2) a scaled score s becomes softcap * tanh(s / softcap).
        """

    def slots(self, meta: Any) -> torch.Tensor | None:
        """Returns [T], the slots of the step's K and V, for a kernel that stores K and V before `attend_stored`.

        If it returns None, the caller must pass K and V to `attend`.
        """
        return None

    def attend_stored(
        self,
        q_TND: torch.Tensor,
        k_cache_PSKD: torch.Tensor,
        v_cache_PSKD: torch.Tensor,
        meta: Any,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Returns the output of `attend`, for a step whose K and V are stored already. Only for backends whose `slots`
        does not return None.
        """
        raise NotImplementedError


def resolve(name: str, device: torch.device) -> str:
    """Returns the backend that `name` selects: for auto, triton on CUDA and torch elsewhere; else `name` itself."""
    if name != "auto":
        return name
    return "triton" if device.type == "cuda" else "torch"


def create(name: str, device: torch.device) -> AttentionBackend:
    """Returns the backend called `name`. Raises ConfigError if it is not in BACKENDS or a package is not installed."""
    if name not in BACKENDS:
        raise ConfigError(f"--attention-backend {name}: not one of {', '.join(sorted(BACKENDS))}")
    module, _, attribute = BACKENDS[name].partition(":")
    try:
        backend: AttentionBackend = getattr(importlib.import_module(module), attribute)(device)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--attention-backend {name}: {error.name} is not installed here") from error
    return backend
