"""Compares the base model that an adapter names with the one that is served, by the last parts of their names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

MAX_CONFIG_BYTES = 16 << 20

SNAPSHOT = re.compile(r"models--(?:.*--)?(?P<name>[^/]+)/snapshots/[^/]+$")
"""The end of the path of a model in the hub's cache."""

CONVERTED = re.compile(r"([-_](unsloth|bnb|gptq|awq|hf|mlx|[48]-?bits?|bf16|fp16))+$")
"""The end of the names of conversions, on which adapters for a model are trained."""


def is_same_model(named: str, directory: Path, served_names: Sequence[str] = ()) -> bool:
    """Returns whether `named`, a hub id or a path, may be the model in `directory`.

    Owner, path and the marks of conversions ("-bnb-4bit") do not count. A directory may have any name, so the name in
    its config.json and the names under which it is served count too.
    """
    return _plain(named) in {_plain(name) for name in (*_names_of(directory), *served_names)}


def _names_of(directory: Path) -> list[str]:
    found = SNAPSHOT.search(directory.as_posix())
    names = [found["name"] if found is not None else directory.name]
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_CONFIG_BYTES else {}
        names += [fields["_name_or_path"]] if isinstance(fields["_name_or_path"], str) else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # it has no name in its config
    return names


def _plain(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    return CONVERTED.sub("", last)
