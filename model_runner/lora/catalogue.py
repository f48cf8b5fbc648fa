"""The checkpoint module names that an adapter can change, and where each is: sites and their slices.

    model.layers.3.self_attn.v_proj        slice 2 of site "layers.3.qkv"
    model.layers.3.self_attn.qkv_proj      all three slices, where an adapter was trained on a fused linear

Knows nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from model_runner.lora.site import EXPERTS, NORMS, Site, Slice

EMBEDDING_AND_HEAD = ("model.embed_tokens", "lm_head")
"""The modules of every decoder that are outside of its layers."""

FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "gate_up_proj",
}
"""The name of one linear that is these modules side by side."""

EXPERTS_BLOCK = ".block_sparse_moe."
"""Stands in the names of experts in Mixtral's checkpoints."""


@dataclass(frozen=True, eq=False)
class SiteRef:
    """Where the delta of one module goes: one slice of a site."""

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
    """The slices of a model's sites by full module name, in the model's order.

    `fused` are names that mean all slices of a site. `norms` are apart, as nothing can target them. `renamed` are the
    names of experts in transformers 5.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = {site.name: site for site in sites}
        norms = [SiteRef(site, 0) for site in sites if site.group == NORMS]
        self.norms: dict[str, tuple[SiteRef, ...]] = {ref.module: (ref,) for ref in norms}
        sites = [site for site in sites if site.group != NORMS]
        self.refs: dict[str, tuple[SiteRef, ...]] = {}
        self.fused: dict[str, tuple[SiteRef, ...]] = {}
        for site in sites:
            refs = tuple(SiteRef(site, index) for index in range(len(site.slices)))
            self.refs |= {ref.module: (ref,) for ref in refs}
            name = FUSED.get(tuple(piece.module for piece in site.slices))
            if name is not None:
                self.fused[f"{site.path}.{name}"] = refs
        experts = [module for module in [*self.refs, *self.fused] if EXPERTS_BLOCK in module]
        self.renamed = {self.renamed_by_transformers(module): module for module in experts}
        self.experts: dict[int, list[Site]] = {}
        for site in sites:
            if site.group == EXPERTS:
                self.experts.setdefault(site.layer, []).append(site)

    @property
    def modules(self) -> list[str]:
        """The full names of the modules that can be targeted."""
        return list(self.refs)

    def knows(self, module: str) -> bool:
        """Whether the name is that of a module, a fused module or a norm."""
        return module in self.refs or module in self.fused or module in self.norms

    def find(self, module: str) -> tuple[SiteRef, ...]:
        """The slices that the module's delta goes to, side by side."""
        return self.refs.get(module) or self.norms.get(module) or self.fused[module]

    def module_of(self, site: Site) -> str:
        """The name of the module, fused or not, that is all of a site."""
        name = FUSED.get(tuple(piece.module for piece in site.slices), site.slices[0].module)
        return f"{site.path}.{name}"

    @staticmethod
    def renamed_by_transformers(module: str) -> str:
        """A module's name in transformers 5, which calls Mixtral's experts as those of other models."""
        return module.replace(EXPERTS_BLOCK, ".mlp.")

    def with_fused(self, fused: AbstractSet[str]) -> list[str]:
        """The modules, with these fused ones instead of their parts."""
        if not fused:
            return self.modules
        stand_in = {ref.module: name for name in fused for ref in self.fused[name]}
        return list(dict.fromkeys(stand_in.get(module, module) for module in self.refs))


def leaf(module: str) -> str:
    """The last part of a module's name, which is how target modules are usually given."""
    return module.rpartition(".")[2]


def is_named(module: str, name: str) -> bool:
    """Whether `name` is the module's full name, or its end after a dot."""
    return module == name or module.endswith("." + name)
