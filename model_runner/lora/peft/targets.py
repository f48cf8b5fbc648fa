"""Which modules a PEFT config targets, with which rank and scaling: PEFT's matching rules on our catalogue.

    target_modules  a list: the full name, or its end after a dot; a string: a regular expression for the full name,
                    or "all-linear"
    exclude_modules the same, and wins
    layers_...      for lists only: the first number in the name is the layer
    rank_pattern    the first key that matches the name or its end after a dot, as a regular expression; AdaLoRA's:
                    by full name, which of the values were kept

Knows nothing of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import TypeVar

from engine.errors import AdapterError
from model_runner.lora.catalogue import OUTSIDE, Catalogue, leaf
from model_runner.lora.formats.base import Target
from model_runner.lora.peft.config import CONFIG_NAME, PeftConfig

ALL_LINEAR = "all-linear"

V = TypeVar("V", int, float)


def resolve_targets(
    config: PeftConfig, catalogue: Catalogue, adapted: AbstractSet[str] = frozenset()
) -> dict[str, Target]:
    """Every module the config targets. Raises AdapterError for a target that the model has not.

    `adapted` are the modules that the tensors are about: fused ones among them stand for several of the model's own,
    and with `ensure_weight_tying` what PEFT saves of the embedding's twin, the head, is targeted as it is.
    """
    fused = adapted & catalogue.fused.keys()
    targeted = [module for module in _selected(config, catalogue, fused) if not _excluded(config, module)]
    if config.ensure_weight_tying and set(targeted) & set(OUTSIDE):
        targeted += [module for module in OUTSIDE if module in adapted and module not in targeted]
    if not targeted:
        raise AdapterError("target_modules: no module is left after exclude_modules and layers_to_transform")
    kept = {_owner(key): sum(rank) for key, rank in (config.rank_pattern or {}).items() if isinstance(rank, list)}
    given = {key: rank for key, rank in (config.rank_pattern or {}).items() if isinstance(rank, int)}
    ranks = _patterns(given, "rank_pattern")
    alphas = _patterns(config.alpha_pattern, "alpha_pattern")
    targets = {}
    for module in targeted:
        began = _by_pattern(ranks, module, config.r)
        rank = kept.get(module, began)
        alpha = _by_pattern(alphas, module, config.alpha)
        targets[module] = Target(module, rank, config.scaling(alpha, rank), began)
    return targets


def target_of(config: PeftConfig, name: str) -> Target:
    """Rank and scaling of one module or parameter, by the patterns."""
    given = {key: rank for key, rank in (config.rank_pattern or {}).items() if isinstance(rank, int)}
    rank = _by_pattern(_patterns(given, "rank_pattern"), name, config.r)
    alpha = _by_pattern(_patterns(config.alpha_pattern, "alpha_pattern"), name, config.alpha)
    return Target(name, rank, config.scaling(alpha, rank), rank)


def _owner(key: str) -> str:
    """The module of an AdaLoRA pattern's key, which ends in lora_E and may have the adapter's name behind it."""
    return key.rpartition(".lora_E")[0] or key


def _selected(config: PeftConfig, catalogue: Catalogue, fused: AbstractSet[str]) -> list[str]:
    targets = config.target_modules
    everything = catalogue.with_fused(fused)
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return [module for module in everything if module not in OUTSIDE]
        found = [module for module in everything if _compiled(targets, "target_modules").fullmatch(module)]
        if not found:
            raise AdapterError(f"target_modules: {targets!r} matches no module of the model")
        return found
    for target in targets or []:
        if not any(ends(module, target) for module in everything):
            known = ", ".join(sorted({leaf(module) for module in everything}))
            raise AdapterError(f"target_modules: the model has no module {target!r} (it has {known})")
    named = [module for module in everything if any(ends(module, target) for target in targets or [])]
    return [module for module in named if _in_layers(config, module)]


def _excluded(config: PeftConfig, module: str) -> bool:
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        return bool(excluded and _compiled(excluded, "exclude_modules").fullmatch(module))
    return any(ends(module, name) for name in excluded or [])


def _in_layers(config: PeftConfig, module: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    layer = _layer(config.layers_pattern, module)
    return layer is not None and layer in ([wanted] if isinstance(wanted, int) else wanted)


def _layer(patterns: list[str] | str | None, module: str) -> int | None:
    names = [patterns] if isinstance(patterns, str) else patterns or []
    expressions = [rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\." for name in names if name]
    for expression in expressions or [r".*?\.[^.]*\.(?P<layer>\d+)\."]:
        found = _compiled(expression, "layers_pattern").match(module)
        if found is not None and found["layer"] is not None:  # an alternative in the pattern may leave it out
            return int(found["layer"])
    return None


def _patterns(pattern: Mapping[str, V] | None, option: str) -> list[tuple[re.Pattern[str], V]]:
    """Compiled once: a config may name every module of a deep model, which is more than re caches."""
    return [(_compiled(rf"(.*\.)?({key})$", option), value) for key, value in (pattern or {}).items()]


def _by_pattern(patterns: list[tuple[re.Pattern[str], V]], module: str, default: V) -> V:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def ends(module: str, name: str) -> bool:
    """Whether `module` is called `name`, in full or by its end after a dot."""
    """Whether the module is called so, or ends so after a dot."""
    return module == name or module.endswith("." + name)


def _compiled(expression: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{CONFIG_NAME}: {option}: {expression!r} is no regular expression ({error})") from error
