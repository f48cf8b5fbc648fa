"""Resolves the modules that adapters may change, and the groups that get rank pages.

Both come from the flags and the start-up adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import ConfigError
from model_runner.lora.catalogue import FUSED
from model_runner.lora.normal_form import NormalForm
from model_runner.lora.peft.survey import AdapterSurvey
from model_runner.lora.site import EMBED, EXPERTS, HEAD, NORMS, Site

LARGE = (EMBED, HEAD, EXPERTS)
"""Groups whose rank pages are large: they are allocated only if a start-up adapter or the flag names their modules."""


def expand(given: list[str] | None, sites: Sequence[Site]) -> list[str] | None:
    """Returns --lora-target-modules with the names of fused linears, such as qkv_proj, replaced by their parts."""
    if given is None:
        return None
    parts = {name: list(modules) for modules, name in FUSED.items() if set(modules) <= set(_modules(sites))}
    return list(dict.fromkeys(module for name in given for module in parts.get(name, [name])))


def check_targets(given: list[str] | None, sites: Sequence[Site]) -> None:
    """Raises ConfigError for a module of --lora-target-modules that the model does not have."""
    modules = _modules(sites)
    unknown = [name for name in given or [] if name != "all" and name not in modules]
    if unknown:
        raise ConfigError(
            f"--lora-target-modules {' '.join(unknown)}: this model has no such module; it has {' '.join(modules)}"
        )


def resolve_targets(
    given: list[str] | None, adapters: Sequence[NormalForm | AdapterSurvey], sites: Sequence[Site]
) -> list[str]:
    """Returns the modules that adapters may change, in the model's order.

    "all" selects the linears of the layers, without the modules of the LARGE groups. It is the default
    if neither the flag nor an adapter names a module.
    """
    found = {target for adapter in adapters for target in adapter.targets}
    wanted = found | set(given or ())
    if (given is None and not found) or "all" in wanted:
        wanted |= {piece.module for site in sites if site.group not in (*LARGE, NORMS) for piece in site.slices}
    return [module for module in _modules(sites) if module in wanted]


def groups_of(
    targets: list[str], named: set[str], adapters: Sequence[NormalForm | AdapterSurvey], sites: Sequence[Site]
) -> set[str]:
    """Returns the groups of `targets`.

    A LARGE group is included only if one of its modules is in `named` or an adapter has rank pages of the group. The
    targets do not suffice to decide this: a module of an expert may have the name of another layer's linear, and an
    adapter may have a full embedding or head, which needs no rank pages.
    """
    groups = {site.group for site in sites if any(piece.module in targets for piece in site.slices)} - {NORMS}
    for large in LARGE:
        modules = {piece.module for site in sites if site.group == large for piece in site.slices}
        if not modules & named and not any(large in adapter.footprint.pages for adapter in adapters):
            groups.discard(large)
    return groups


def _modules(sites: Sequence[Site]) -> list[str]:
    """Returns the names of all modules, without duplicates, in the model's order."""
    return list(dict.fromkeys(piece.module for site in sites for piece in site.slices))
