"""The checkpoint names of the modules that an adapter can change, and the sites and slices of each module.

    model.layers.3.self_attn.v_proj        slice 2 of site "layers.3.qkv"
    model.layers.3.self_attn.qkv_proj      all three slices, where an adapter was trained on a fused linear

Does not depend on adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from model_runner.lora.site import EXPERTS, NORMS, Site, Slice

EMBEDDING_AND_HEAD = ("model.embed_tokens", "lm_head")
"""The modules outside of the decoder layers that an adapter can target."""

FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "gate_up_proj",
}
"""The name of the fused linear that some models have instead of these modules."""

EXPERTS_BLOCK = ".block_sparse_moe."
"""A part of the module names of experts in Mixtral's checkpoints."""


@dataclass(frozen=True, eq=False)
class SiteRef:
    """One slice of a site: the place where the delta of one module is added."""

    site: Site
    index: int

    @property
    def slice(self) -> Slice:
        """The slice of the site."""
        return self.site.slices[self.index]

    @property
    def module(self) -> str:
        """The full checkpoint name of the slice's module."""
        return f"{self.site.path}.{self.slice.module}" if self.site.path else self.slice.module

    @property
    def in_features(self) -> int:
        """I, the in features of the site."""
        return self.site.in_features

    @property
    def out_features(self) -> int:
        """The output columns of the slice."""
        return self.slice.width


class Catalogue:
    """The slices of a model's sites by full module name, in the model's order.

    `fused` maps the name of a fused linear to all slices of its site. `norms` are separate, because an adapter cannot
    target norms, only replace them. `renamed` maps the names of experts in transformers 5 to the checkpoint's.
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
        """Returns whether `module` is the name of a module, a fused module or a norm."""
        return module in self.refs or module in self.fused or module in self.norms

    def find(self, module: str) -> tuple[SiteRef, ...]:
        """Returns the slices that the module's delta is added to, side by side."""
        return self.refs.get(module) or self.norms.get(module) or self.fused[module]

    def module_of(self, site: Site) -> str:
        """Returns the name of the module, fused or not, that covers all slices of a site."""
        name = FUSED.get(tuple(piece.module for piece in site.slices), site.slices[0].module)
        return f"{site.path}.{name}"

    @staticmethod
    def renamed_by_transformers(module: str) -> str:
        """Returns the module's name in transformers 5, which names Mixtral's experts like those of other models."""
        return module.replace(EXPERTS_BLOCK, ".mlp.")

    def with_fused(self, fused: AbstractSet[str]) -> list[str]:
        """Returns the modules that can be targeted, with the names in `fused` instead of their parts."""
        if not fused:
            return self.modules
        stand_in = {ref.module: name for name in fused for ref in self.fused[name]}
        return list(dict.fromkeys(stand_in.get(module, module) for module in self.refs))


def leaf(module: str) -> str:
    """Returns the last part of a module's name, the usual form of a target module in configs and flags."""
    return module.rpartition(".")[2]


def is_named(module: str, name: str) -> bool:
    """Returns whether `name` is the module's full name, or its end after a dot."""
    return module == name or module.endswith("." + name)
