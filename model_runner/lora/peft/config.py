"""Reads adapter_config.json of a PEFT adapter: each option by name, as the format or one of its variants declares it.

Names and meanings are those of PEFT 0.21. A setting that would change the output and is not served is refused with its
name and value; an option that is not declared anywhere is refused unless it is empty. Names of modules that the model
has not, and the task, are no fault: they change nothing. Does not depend on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from engine.errors import AdapterError
from model_runner.lora.files.adapter_config import CONFIG_NAME, unsupported
from model_runner.lora.files.advice import MERGE, with_option, without_option
from model_runner.lora.files.quoted import quoted_name, quoted_value
from model_runner.lora.formats import registry
from model_runner.lora.formats.base import PeftFormat, RankPattern
from model_runner.lora.normal_form import MAX_RANK
from model_runner.lora.variants.base import Variant
from model_runner.lora.variants.target_parameters import TargetParameters

PROVENANCE = frozenset({
    *("auto_mapping", "peft_version", "revision", "inference_mode"),
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
    "merge_weights",
})  # fmt: skip
"""Options of every format about where an adapter comes from: PEFT's, and those that trainers and old versions add."""

REFUSED_TYPES_THAT_MERGE = frozenset({"IA3", "OFT", "BOFT", "VERA", "FOURIERFT", "HRA", "LN_TUNING", "POLY", "VBLORA"})
"""Other types of PEFT whose change can be merged into the weights."""

BY_TENSORS = f"{with_option('target_modules', 'null')}, and the modules that have tensors are targeted"
"""The advice for a config whose targets are not those of the tensors."""

V = TypeVar("V", bound=Variant)
S = TypeVar("S", bound=msgspec.Struct)


class PeftOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options that every format uses, with PEFT's defaults."""

    peft_type: str = "LORA"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    rank_pattern: dict[str, int | list[bool]] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


class PeftConfig(PeftOptions, frozen=True, kw_only=True):
    """A checked config: the common options, the format with its options, and the variants that are on."""

    format: PeftFormat
    variants: tuple[Variant, ...]

    @property
    def name(self) -> str:
        """The usual name of the format, or of the variant that replaces it, such as "DoRA"."""
        return next((variant.format_name for variant in self.variants if variant.format_name), self.format.name)

    @property
    def ranks(self) -> RankPattern:
        """The option rank_pattern, which each format reads in its own way."""
        return self.rank_pattern or {}

    @property
    def alphas(self) -> Mapping[str, float]:
        """The option alpha_pattern: alphas by regular expression."""
        return self.alpha_pattern or {}

    @property
    def required_parts(self) -> frozenset[str]:
        """The parts that variants add to every targeted module."""
        return frozenset().union(*(variant.required_parts for variant in self.variants))

    def variant(self, kind: type[V]) -> V | None:
        """Returns the variant of class `kind`, or None if it is off."""
        return next((variant for variant in self.variants if isinstance(variant, kind)), None)

    def scaling(self, alpha: float, rank: int) -> float:
        """Returns the factor that B A is multiplied with, which a variant decides, or else the format."""
        decided = (variant.scaling(alpha, rank) for variant in self.variants)
        return next((scaling for scaling in decided if scaling is not None), self.format.scaling(alpha, rank))

    def scale_bytes(self) -> bytes:
        """Returns the options that change the delta and are not in the tensors, as bytes of the revision.

        The order of patterns counts.
        """
        names = [variant.revision_name for variant in self.variants if variant.revision_name]
        is_rescaled = any(variant.scaling(1.0, 1) is not None for variant in self.variants)
        patterns = [list(self.ranks.items()), list(self.alphas.items())]
        more = [*self.format.revision(), *(option for variant in self.variants for option in variant.revision())]
        kind = "-".join(["peft", self.peft_type.lower(), *names])
        return msgspec.json.encode(
            [kind, self.format.default_rank, self.format.default_alpha, is_rescaled, *patterns, *more]
        )


def parse_config(options: dict[str, Any]) -> PeftConfig:
    """Checks the decoded JSON object of a config. Raises AdapterError naming the option."""
    form = _find_format(options)
    _refuse_options(options, form)
    common = _convert(options, PeftOptions)
    variants = [_convert(options, kind) for kind in form.variants]
    for variant in variants:
        variant.check()
    config = PeftConfig(
        **msgspec.structs.asdict(common),
        format=_convert(options, form),
        variants=tuple(variant for variant in variants if variant.is_on),
    )
    for variant in config.variants:
        variant.check_beside([other for other in config.variants if other is not variant])
    config.format.check()
    _check_numbers(config)
    _check_targets(config)
    return config


def _find_format(options: Mapping[str, Any]) -> type[PeftFormat]:
    """Returns the format of the config. Called before all checks, because each format has its own options."""
    name = options.get("peft_type", "LORA")
    kind = name.upper() if isinstance(name, str) else ""
    if kind not in registry.FORMATS:
        merge = f"; {MERGE}" if kind in REFUSED_TYPES_THAT_MERGE else ""
        raise unsupported("peft_type", name, f"only {', '.join(registry.FORMATS)}{merge}")
    return registry.find_format(kind)


def _refuse_options(options: Mapping[str, Any], form: type[PeftFormat]) -> None:
    common = frozenset(PeftOptions.__struct_fields__)
    for name, value in options.items():
        if not value:
            continue
        if name in registry.refused_options():
            raise unsupported(name, value, f"{registry.refused_options()[name]}; {MERGE}")
        if name not in form.used_options() | form.harmless | common | PROVENANCE:
            is_known = any(name in other.used_options() for other in registry.all_formats())
            reason = "is no option of this peft_type" if is_known else "is unknown"
            raise AdapterError(
                f"{CONFIG_NAME}: option {name}={quoted_value(value)} {reason}: if the adapter computes the same without"
                f" it, {without_option(quoted_name(name)[1:-1])}"
            )


def _convert(options: Mapping[str, Any], kind: type[S]) -> S:
    """Returns a `kind` with the options that are its fields; null means the default of a switch, as in PEFT.

    Raises AdapterError for values of a wrong type.
    """
    fields = {
        field.name: options[field.name]
        for field in msgspec.structs.fields(kind)
        if field.name in options and not (options[field.name] is None and isinstance(field.default, bool))
    }
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise AdapterError(f"{CONFIG_NAME}: {error}") from error


def _check_numbers(config: PeftConfig) -> None:
    form = config.format
    form.final_ranks(config.ranks)
    ranks = {form.rank_option: form.default_rank} if form.rank_option else {}
    ranks |= {f"rank_pattern[{key!r}]": rank for key, rank in form.pattern_ranks(config.ranks).items()}
    for where, rank in ranks.items():
        if not 1 <= rank <= form.highest_rank:
            merge = f": {MERGE}" if rank > MAX_RANK else ""
            raise AdapterError(f"{CONFIG_NAME}: {where}={rank} is not a rank from 1 to {form.highest_rank}{merge}")
    alphas = {form.alpha_option: form.default_alpha} if form.alpha_option else {}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in config.alphas.items()}
    for where, alpha in alphas.items():
        if not 0 < alpha < math.inf:
            raise AdapterError(f"{CONFIG_NAME}: {where}={alpha:g} is not a finite number above 0")


def _check_targets(config: PeftConfig) -> None:
    is_empty = config.target_modules is not None and not config.target_modules
    if is_empty and config.variant(TargetParameters) is None:
        raise AdapterError(
            f"{CONFIG_NAME}: target_modules={quoted_value(config.target_modules)} names no module: {BY_TENSORS}"
        )
    has_layers = config.layers_to_transform is not None or bool(config.layers_pattern)
    if has_layers and isinstance(config.target_modules, str):
        raise AdapterError(
            f"{CONFIG_NAME}: layers_to_transform and layers_pattern need a list of target_modules, "
            f"not {quoted_value(config.target_modules)}: {BY_TENSORS}"
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise AdapterError(
            f"{CONFIG_NAME}: layers_pattern={quoted_value(config.layers_pattern)} without layers_to_transform:"
            f" {without_option('layers_pattern')}"
        )
