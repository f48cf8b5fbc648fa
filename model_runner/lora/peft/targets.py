"""Resolves the modules that a PEFT config targets, their ranks and scalings, by PEFT's matching rules.

    target_modules  a list: the full name, or its end after a dot; a string: a regular expression for the full name,
                    or "all-linear"; null: the modules that have tensors
    exclude_modules the same rules; it takes precedence
    layers_...      only for lists: the first number in the name is the layer
    rank_pattern    the first key that matches the name or its end after a dot, as a regular expression

Names may be those inside of a multimodal model. What a config names and the model or the files have not is noted, and
changes nothing. Does not depend on the values of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TypeVar

from engine.errors import AdapterError
from model_runner.lora.catalogue import EMBEDDING_AND_HEAD, Catalogue, is_named, leaf
from model_runner.lora.files.adapter_config import CONFIG_NAME
from model_runner.lora.files.quoted import quoted_name, some
from model_runner.lora.peft.config import BY_TENSORS, PeftConfig
from model_runner.lora.peft.names import spellings_of
from model_runner.lora.target_module import Target
from model_runner.lora.variants.embedding_and_head import EmbeddingAndHead

ALL_LINEAR = "all-linear"

MULTIMODAL_WORDS = ("language_model", "text_model")
"""Parts of names in configs that were written for a multimodal model."""

V = TypeVar("V", int, float)


def resolve_targets(
    config: PeftConfig, catalogue: Catalogue, adapted: AbstractSet[str], notes: list[str]
) -> dict[str, Target]:
    """Returns the modules that the config targets and that have tensors, which `adapted` are.

    A fused module among these replaces its parts, and with `ensure_weight_tying` the embedding or head among them is
    targeted too if the other one is. Targets that the model or the files lack are added to `notes`. Raises AdapterError
    if no target is left.
    """
    targeted = _selected(config, catalogue, adapted, notes)
    if config.variant(EmbeddingAndHead) is not None and set(targeted) & set(EMBEDDING_AND_HEAD):
        targeted += [module for module in EMBEDDING_AND_HEAD if module in adapted and module not in targeted]
    bare = [module for module in targeted if module not in adapted]
    if bare and len(bare) < len(targeted):
        notes.append(f"{len(bare)} of the targeted modules have no tensors and are the base's ({some(bare)})")
    elif bare:
        raise AdapterError(f"none of the modules that {CONFIG_NAME} targets has tensors ({some(bare)}): {BY_TENSORS}")
    scales = Scales(config, catalogue)
    return {module: scales.target(module) for module in targeted if module in adapted}


class Scales:
    """The ranks and alphas of a config, its patterns compiled once.

    A config may name every module of a deep model, which is more patterns than `re` caches.
    """

    def __init__(self, config: PeftConfig, catalogue: Catalogue) -> None:
        self._config = config
        self._catalogue = catalogue
        named = [*config.ranks, *config.alphas]
        self._multimodal = any(word in key for key in named for word in MULTIMODAL_WORDS)
        self._final_ranks = config.format.final_ranks(config.ranks)
        self._ranks = _patterns(config.format.pattern_ranks(config.ranks), "rank_pattern")
        self._alphas = _patterns(config.alphas, "alpha_pattern")

    def target(self, name: str) -> Target:
        """Returns the rank and scaling of the module or parameter `name`."""
        form = self._config.format
        names = spellings_of(name, self._catalogue, multimodal=self._multimodal)
        initial = _by_pattern(self._ranks, names, form.default_rank)
        rank = next((self._final_ranks[one] for one in names if one in self._final_ranks), initial)
        alpha = _by_pattern(self._alphas, names, form.default_alpha)
        return Target(name, rank, self._config.scaling(alpha, rank), initial)


def _selected(config: PeftConfig, catalogue: Catalogue, adapted: AbstractSet[str], notes: list[str]) -> list[str]:
    """Returns the modules that the config targets, in the model's order. Raises AdapterError if there is none."""
    targets = config.target_modules
    everything = catalogue.with_fused(adapted & catalogue.fused.keys())
    if targets is None:
        return [module for module in everything if module in adapted]
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        linears = [module for module in everything if module not in EMBEDDING_AND_HEAD or module in adapted]
        return [module for module in linears if not _excluded(config, module)]
    named = _matching(config, catalogue, everything, adapted)
    if not isinstance(targets, str):
        unknown = [target for target in targets if target not in named.used]
        if len(unknown) == len(targets) or not named.modules:
            known = ", ".join(sorted({leaf(module) for module in everything}))
            raise AdapterError(
                f"target_modules: the model has no module {some(unknown)} (it has {known}); {BY_TENSORS}"
                if unknown
                else f"target_modules: no module is left after exclude_modules and layers_to_transform; {BY_TENSORS}"
            )
        if unknown:
            notes.append(f"target_modules names what the model has not ({some(unknown)})")
    elif not named.modules:
        what = "matches no module of the model" if not named.used else "leaves no module after exclude_modules"
        raise AdapterError(f"target_modules: {quoted_name(targets)} {what}; {BY_TENSORS}")
    return named.modules


@dataclass
class _Named:
    """The modules that the config selects, and the items of target_modules that name a module of the model."""

    modules: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)


def _matching(config: PeftConfig, catalogue: Catalogue, everything: list[str], adapted: AbstractSet[str]) -> _Named:
    """Returns the modules that target_modules selects under one of their names, and that are not excluded."""
    targets, found = config.target_modules, _Named()
    if isinstance(targets, str):
        expression = _compiled(targets, "target_modules")
        wrapped = True
    else:
        names = frozenset(targets or ())
        wrapped = any(word in name for name in names for word in MULTIMODAL_WORDS)
    for module in everything:
        for name in spellings_of(module, catalogue, multimodal=wrapped and module in adapted):
            if isinstance(targets, str):
                hits = {targets} if expression.fullmatch(name) else set()
            else:
                hits = set(names.intersection(_ends(name)))
            found.used |= hits
            is_whole = name in hits
            if hits and not _excluded(config, name) and (is_whole or _in_layers(config, name)):
                found.modules.append(module)
                break
    return found


def _ends(name: str) -> Iterator[str]:
    """Yields the name, and what follows each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


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


def _by_pattern(patterns: list[tuple[re.Pattern[str], V]], names: Iterable[str], default: V) -> V:
    return next((value for name in names for pattern, value in patterns if pattern.match(name)), default)


def _compiled(expression: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{CONFIG_NAME}: {option}: {expression!r} is no regular expression ({error})") from error
