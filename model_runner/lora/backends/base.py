"""The interface of LoRA backends: one small base class and a lazy table of names.

A backend turns a step's layout into metadata (`plan`), and applies every lane's change to the output of a site's base
linear (`adapt`). The base linear is the site's LinearMethod, which the layer calls; a backend that computes the base
GEMM itself finds it in `site.base`. The head is a linear too, over the rows that need logits, with metadata planned
from a layout of these rows.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import ConfigError
from model_runner.compute.kernels.cpu.kernel_user import KernelUser
from model_runner.lora.site import Site
from model_runner.step.layout import Layout

if TYPE_CHECKING:
    from model_runner.lora.pool.pages import RankPagePool

BACKENDS = {
    "torch": "model_runner.lora.backends.torch_backend:TorchLora",
    "triton": "model_runner.lora.backends.triton_backend:TritonLora",
    "csgmv": "model_runner.lora.backends.csgmv_backend:CsgmvLora",
}

LARGEST_LANE = 64
"""The most pages that a lane may name in a group: twice those of the highest rank, so that two can be mixed."""


@dataclass(frozen=True)
class Options:
    """`chunk_size`: the most rows of a tile of csgmv. `lane_pages`: the most pages a lane may name in a group."""

    chunk_size: int = 16
    lane_pages: int = LARGEST_LANE


DEFAULTS = Options()


class LoraBackend(KernelUser, ABC):
    """Applies the adapters of each token's lane to the output of a site's base linear.

        y = x W^T + b  +  sum over rank pages    scale * (x A^T) B
                       +  sum over vector slots  scale * (gain_less_one * (x W^T) + bias)

    A backend uses the rank pages and lanes of one model. `plan` is called once per step, `adapt` once per site.
    """

    def __init__(self, pages: RankPagePool, options: Options = DEFAULTS) -> None:
        self.pages = pages
        self.options = options

    @abstractmethod
    def plan(self, layout: Layout, into: Any | None = None) -> Any:
        """Returns the step's metadata, computed from host arrays without a device sync.

        `into`: metadata from `static` for a layout of as many chunks of length 1; it is filled in place and returned.
        Without `into`, returns None if no chunk has a lane.
        """

    def static(self, tokens: int) -> Any:
        """Returns metadata in buffers of fixed addresses, for CUDA graphs of decode steps of `tokens` chunks."""
        raise NotImplementedError(f"{type(self).__name__} has no static buffers")

    @abstractmethod
    def adapt(self, y_TO: torch.Tensor, x: torch.Tensor, site: Site, meta: Any) -> None:
        """Applies the gains, deltas and biases of each token's lane to the base's output y [T, O], in place.

        No row affects another. x is [T, I], or the tokens [T] of the embedding, whose inputs are one-hot.
        `meta` is the result of `plan`; where `plan` returned None, `adapt` is not called.
        """


def resolve(name: str, device: torch.device) -> str:
    """Returns the backend that `auto` selects on the device; any other name is returned unchanged."""
    if name != "auto":
        return name
    return "csgmv" if device.type == "cuda" else "torch"


def create(name: str, pages: RankPagePool, options: Options = DEFAULTS) -> LoraBackend:
    """Returns the backend called `name`.

    Raises ConfigError for a name that is not in the table, and for kernels that the device cannot run.
    """
    if name not in BACKENDS:
        raise ConfigError(f"--lora-backend {name}: not one of {', '.join(sorted(BACKENDS))}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: LoraBackend = getattr(importlib.import_module(module), attribute)(pages, options)
    return backend
