"""Resolves the modules that a PEFT config targets, their ranks and scalings, by PEFT's matching rules.

    target_modules  a list: the full name, or its end after a dot; a string: a regular expression for the full name,
                    or "all-linear"
    exclude_modules the same rules; it takes precedence
    layers_...      only for lists: the first number in the name is the layer
    rank_pattern    the first key that matches the name or its end after a dot, as a regular expression

Does not depend on tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import TypeVar

from engine.errors import AdapterError
from model_runner.lora.catalogue import EMBEDDING_AND_HEAD, Catalogue, is_named, leaf
from model_runner.lora.files.adapter_config import CONFIG_NAME
from model_runner.lora.peft.config import PeftConfig
from model_runner.lora.target_module import Target
from model_runner.lora.variants.embedding_and_head import EmbeddingAndHead

ALL_LINEAR = "all-linear"

V = TypeVar("V", int, float)


def resolve_targets(
    config: PeftConfig, catalogue: Catalogue, adapted: AbstractSet[str] = frozenset()
) -> dict[str, Target]:
    """Returns every module that the config targets. Raises AdapterError for a target that the model does not have.

    `adapted` are the modules that have tensors. A fused module among them replaces its parts, and with
    `ensure_weight_tying` the embedding or head among them is targeted too if the other one is.
    """
    fused = adapted & catalogue.fused.keys()
    targeted = [module for module in _selected(config, catalogue, fused) if not _excluded(config, module)]
    if config.variant(EmbeddingAndHead) is not None and set(targeted) & set(EMBEDDING_AND_HEAD):
        targeted += [module for module in EMBEDDING_AND_HEAD if module in adapted and module not in targeted]
    if not targeted:
        raise AdapterError("target_modules: no module is left after exclude_modules and layers_to_transform")
    scales = Scales(config)
    return {module: scales.target(module) for module in targeted}


class Scales:
    """The ranks and alphas of a config, its patterns compiled once.

    A config may name every module of a deep model, which is more patterns than `re` caches.
    """

    def __init__(self, config: PeftConfig) -> None:
        self._config = config
        self._final_ranks = config.format.final_ranks(config.ranks)
        self._ranks = _patterns(config.format.pattern_ranks(config.ranks), "rank_pattern")
        self._alphas = _patterns(config.alphas, "alpha_pattern")

    def target(self, name: str) -> Target:
        """Returns the rank and scaling of the module or parameter `name`."""
        form = self._config.format
        initial = _by_pattern(self._ranks, name, form.default_rank)
        rank = self._final_ranks.get(name, initial)
        alpha = _by_pattern(self._alphas, name, form.default_alpha)
        return Target(name, rank, self._config.scaling(alpha, rank), initial)


def _selected(config: PeftConfig, catalogue: Catalogue, fused: AbstractSet[str]) -> list[str]:
    targets = config.target_modules
    everything = catalogue.with_fused(fused)
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return [module for module in everything if module not in EMBEDDING_AND_HEAD]
        found = [module for module in everything if _compiled(targets, "target_modules").fullmatch(module)]
        if not found:
            raise AdapterError(f"target_modules: {targets!r} matches no module of the model")
        return found
    for target in targets or []:
        if not any(is_named(module, target) for module in everything):
            known = ", ".join(sorted({leaf(module) for module in everything}))
            raise AdapterError(f"target_modules: the model has no module {target!r} (it has {known})")
    named = [module for module in everything if any(is_named(module, target) for target in targets or [])]
    return [module for module in named if _in_layers(config, module)]


def _excluded(config: PeftConfig, module: str) -> bool:
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        return bool(excluded and _compiled(excluded, "exclude_modules").fullmatch(module))
    return any(is_named(module, name) for name in excluded or [])


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
        if found is not None and found["layer"] is not None:  # an alternative in the pattern may leave out the layer
            return int(found["layer"])
    return None


def _patterns(pattern: Mapping[str, V], option: str) -> list[tuple[re.Pattern[str], V]]:
    return [(_compiled(rf"(.*\.)?({key})$", option), value) for key, value in pattern.items()]


def _by_pattern(patterns: list[tuple[re.Pattern[str], V]], module: str, default: V) -> V:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _compiled(expression: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{CONFIG_NAME}: {option}: {expression!r} is no regular expression ({error})") from error
