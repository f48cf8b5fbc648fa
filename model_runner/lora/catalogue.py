"""The checkpoint module names that LoRA can land on, and where each lies: a site and one of its slices.

Knows nothing of adapters. "model.layers.3.self_attn.v_proj" is slice 2 of site "layers.3.qkv".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model_runner.lora.site import Site

OUTSIDE = ("lm_head", "model.embed_tokens")
"""Modules of every decoder that adapters may name, and that are no sites unless the model says so."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where one module's delta goes."""

    site: Site
    index: int

    @property
    def in_features(self) -> int:
        """I."""
        return self.site.in_features

    @property
    def out_features(self) -> int:
        """Columns of the slice."""
        return self.site.slices[self.index].width


class Catalogue:
    """All places of a model by full module name, in the model's order."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = {site.name: site for site in sites}
        self.places: dict[str, Place] = {}
        for site in sites:
            for index, piece in enumerate(site.slices):
                self.places[f"{site.path}.{piece.module}" if site.path else piece.module] = Place(site, index)

    @property
    def modules(self) -> list[str]:
        """The full names of the modules that LoRA can land on."""
        return list(self.places)

    @property
    def linears(self) -> list[str]:
        """What PEFT calls all-linear: every place but the embedding and the head."""
        return [name for name, place in self.places.items() if place.site.group not in ("embed", "head")]

    @property
    def outside(self) -> list[str]:
        """The embedding and the head, where they are no sites."""
        return [name for name in OUTSIDE if name not in self.places]


def leaf(module: str) -> str:
    """The last part of a module's name: what target modules are usually called."""
    return module.rpartition(".")[2]
