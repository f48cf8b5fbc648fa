"""Parses the items of --lora-paths, the adapters given at start, and checks that their names differ.

An item is `path`, `name=path`, or a JSON object in SGLang's form {"lora_name", "lora_path", "pinned"} or vLLM's
{"name", "path", "base_model_name"}. The files at a path are not read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.config.server_args import DEMO, ServerArgs, served_names
from engine.errors import ConfigError


def adapter_of(model: str, base_names: Sequence[str]) -> str:
    """Returns the adapter's name that `model` means: what follows a base model's name and a colon, else all of it.

    Of several base names the longest counts. The result depends on no adapter, so a name means one thing only.
    """
    bases = [name for name in base_names if model.startswith(f"{name}:")]
    return model[len(max(bases, key=len)) + 1 :] if bases else model


class AdapterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One parsed item. `path` is the path as given, `base` the base model's name (only in vLLM's form)."""

    name: str
    path: str
    pinned: bool = False
    base: str | None = None


class _SglangForm(msgspec.Struct, forbid_unknown_fields=True):
    lora_name: str
    lora_path: str
    pinned: bool = False

    def spec(self) -> AdapterSpec:
        return AdapterSpec(name=self.lora_name, path=self.lora_path, pinned=self.pinned)


class _VllmForm(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    path: str
    base_model_name: str | None = None

    def spec(self) -> AdapterSpec:
        return AdapterSpec(name=self.name, path=self.path, base=self.base_model_name)


def parse_adapter(item: str) -> AdapterSpec:
    """Parses one item of --lora-paths. Raises a ConfigError that quotes the item."""
    if item.lstrip().startswith("{"):
        spec = _parse_json(item)
    else:
        name, equals, path = item.partition("=")
        if not equals or Path(item).expanduser().is_dir():  # an existing directory whose name contains "=" is a path
            name = path = item
        spec = AdapterSpec(name=name, path=path)
    if not spec.name or not spec.path:
        raise ConfigError(f"--lora-paths {item}: name and path must not be empty")
    return spec


def _parse_json(item: str) -> AdapterSpec:
    form: type[_SglangForm | _VllmForm] = _SglangForm if '"lora_' in item else _VllmForm
    try:
        return msgspec.json.decode(item, type=form).spec()
    except msgspec.MsgspecError as error:
        wanted = '{"lora_name", "lora_path", "pinned"} or {"name", "path", "base_model_name"}'
        raise ConfigError(f"--lora-paths {item}: {error}; expected {wanted}") from error


def adapter_specs(args: ServerArgs) -> list[AdapterSpec]:
    """Returns the adapters given at start; the demo model without any gets the demo adapters. Raises ConfigError."""
    specs = [parse_adapter(item) for item in args.lora_paths]
    if args.model_path is None and not specs and args.enable_lora is not False:
        directories = sorted(path for path in (DEMO / "adapters").iterdir() if path.is_dir())
        specs = [AdapterSpec(name=path.name, path=str(path)) for path in directories]
    _check_names(specs, served_names(args))
    pinned = sum(spec.pinned for spec in specs)
    if pinned > args.max_loras_per_batch - 1:
        raise ConfigError(
            f"--lora-paths: {pinned} adapters are pinned, but --max-loras-per-batch {args.max_loras_per_batch} "
            f"allows {args.max_loras_per_batch - 1}: one lane must stay free for the others"
        )
    return specs


def _check_names(specs: list[AdapterSpec], base_names: list[str]) -> None:
    seen: dict[str, str] = {}
    for spec in specs:
        if spec.name in seen:
            raise ConfigError(f"--lora-paths: the name {spec.name} is given twice ({seen[spec.name]}, {spec.path})")
        if spec.name in base_names:
            raise ConfigError(f"--lora-paths: the name {spec.name} is the base model's; choose another one")
        if adapter_of(spec.name, base_names) != spec.name:
            raise ConfigError(
                f"--lora-paths: the name {spec.name} means the adapter {adapter_of(spec.name, base_names)!r} of a base "
                "model; choose a name that does not begin with a base model's name and a colon"
            )
        seen[spec.name] = spec.path
