"""The checkpoint module names that LoRA can land on, and where each lies: sites and their slices.

    model.layers.3.self_attn.v_proj        slice 2 of site "layers.3.qkv"
    model.layers.3.self_attn.qkv_proj      all three slices, where an adapter was trained on a fused linear

Knows nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from model_runner.lora.site import EXPERTS, NORMS, Site, Slice

OUTSIDE = ("model.embed_tokens", "lm_head")
"""The embedding and the head: modules of every decoder that lie outside of its layers."""

FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "gate_up_proj",
}
"""What a linear of these modules side by side is called."""

BLOCK = ".block_sparse_moe."


@dataclass(frozen=True, eq=False)
class SiteRef:
    """Where one module's delta goes: one slice of a site."""

    site: Site
    index: int

    @property
    def slice(self) -> Slice:
        """The slice."""
        return self.site.slices[self.index]

    @property
    def module(self) -> str:
        """The full name of its module."""
        return f"{self.site.path}.{self.slice.module}" if self.site.path else self.slice.module

    @property
    def in_features(self) -> int:
        """I."""
        return self.site.in_features

    @property
    def out_features(self) -> int:
        """Columns of the slice."""
        return self.slice.width


class Catalogue:
    """All places of a model by full module name, in the model's order; `fused` are names for all slices of a site.

    `norms` are places of their own: nothing can target them.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = {site.name: site for site in sites}
        norms = [SiteRef(site, 0) for site in sites if site.group == NORMS]
        self.norms: dict[str, tuple[SiteRef, ...]] = {place.module: (place,) for place in norms}
        sites = [site for site in sites if site.group != NORMS]
        self.places: dict[str, tuple[SiteRef, ...]] = {}
        self.fused: dict[str, tuple[SiteRef, ...]] = {}
        for site in sites:
            places = tuple(SiteRef(site, index) for index in range(len(site.slices)))
            self.places |= {place.module: (place,) for place in places}
            name = FUSED.get(tuple(piece.module for piece in site.slices))
            if name is not None:
                self.fused[f"{site.path}.{name}"] = places
        self.fused_names = frozenset(leaf(module) for module in self.fused)
        self.renamed = {self.renamed_back(module): module for module in [*self.places, *self.fused] if BLOCK in module}
        self.experts: dict[int, list[Site]] = {}
        for site in sites:
            if site.group == EXPERTS:
                self.experts.setdefault(site.layer, []).append(site)

    @property
    def modules(self) -> list[str]:
        """The full names of the modules that LoRA can land on."""
        return list(self.places)

    def knows(self, module: str) -> bool:
        """Whether it is a module, of its own or fused, or a norm."""
        return module in self.places or module in self.fused or module in self.norms

    def find(self, module: str) -> tuple[SiteRef, ...]:
        """Where the module's delta goes, side by side."""
        return self.places.get(module) or self.norms.get(module) or self.fused[module]

    def whole(self, site: Site) -> str:
        """The module that is all of a site, fused or not."""
        name = FUSED.get(tuple(piece.module for piece in site.slices), site.slices[0].module)
        return f"{site.path}.{name}"

    @staticmethod
    def renamed_back(module: str) -> str:
        """A module's name in transformers 5, which calls Mixtral's experts as all others'."""
        return module.replace(BLOCK, ".mlp.")

    def with_fused(self, fused: AbstractSet[str]) -> list[str]:
        """The modules, with these fused ones in the place of their parts."""
        if not fused:
            return self.modules
        stand_in = {place.module: name for name in fused for place in self.fused[name]}
        return list(dict.fromkeys(stand_in.get(module, module) for module in self.places))


def leaf(module: str) -> str:
    """The last part of a module's name: what target modules are usually called."""
    return module.rpartition(".")[2]
