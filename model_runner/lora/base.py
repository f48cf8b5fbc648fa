"""The LoRA seam: one small base class and a lazy table of names.

A backend turns a step's layout into metadata (`plan`) and computes a site's base linear with every lane's delta on
top (`linear`). It owns the base matmul because gains, shrinks beside the base GEMM and packed weights need that.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import ConfigError
from model_runner.layout import Layout
from model_runner.lora.site import Site

if TYPE_CHECKING:
    from model_runner.lora.pages import RankPages

BACKENDS = {
    "torch": "model_runner.lora.torch_backend:TorchLora",
}


class LoraBackend(ABC):
    """How `y = gain * (x W^T + b) + sum over a lane's pages of scale * (x A^T) B + bias` is computed.

    Built over the rank pages and lanes of one model; `plan` is called once a step, `linear` once a site.
    """

    def __init__(self, pages: RankPages) -> None:
        self.pages = pages

    @abstractmethod
    def plan(self, layout: Layout, into: Any | None = None) -> Any:
        """The step's metadata, from host arrays, without a device sync; `into` reuses static buffers."""

    @abstractmethod
    def linear(self, x_TI: torch.Tensor, site: Site, meta: Any) -> torch.Tensor:
        """[T, I] -> [T, O]: the base linear of the site and each token's own lane on top. Never mixes rows."""


def create(name: str, pages: RankPages) -> LoraBackend:
    """The backend called `name`. Raises ConfigError for a name that is not in the table."""
    if name not in BACKENDS:
        raise ConfigError(f"--lora-backend {name}: not one of {', '.join(sorted(BACKENDS))}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: LoraBackend = getattr(importlib.import_module(module), attribute)(pages)
    return backend
