"""A model's config.json as typed fields: every field that is read is checked, and errors name the field.

Does not depend on any model family. JSON null counts as absent, except in `nullable`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.directory import is_lfs_pointer, lfs_advice
from engine.errors import ConfigError

MAX_CONFIG_BYTES = 16 << 20


class ConfigJson:
    """One JSON object: the file's, or one inside it. `where` is its place, for errors; `seen` are the keys read so far.

    The methods return the value of a key. They raise ConfigError if it has the wrong type or range.
    """

    def __init__(self, where: str, fields: Mapping[str, Any]) -> None:
        self.where = where
        self.fields = fields
        self.seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.fields

    def wrong(self, key: str, why: str) -> ConfigError:
        """Returns an error about `key`, with its value and the reason `why` it is wrong."""
        return ConfigError(f"{self.where}: {key}={json.dumps(self.fields.get(key))[:200]}: {why}")

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Returns a whole number >= `least`. A missing key without a default is an error."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, f"must be a whole number of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a finite number > 0. A missing key without a default is an error."""
        value = self._get(key, default)
        if not _finite(value) or value <= 0:
            raise self.wrong(key, "must be a positive number")
        return float(value)

    def nullable(self, key: str, default: float | None) -> float | None:
        """Returns a finite number > 0, None for null, or the default if the key is missing."""
        if key in self.fields and self.fields[key] is None:
            self.seen.add(key)
            return None
        return None if key not in self.fields and default is None else self.number(key, default)

    def flag(self, key: str, default: bool) -> bool:
        """Returns a boolean, or the default if the key is missing."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """Returns a string, or the default if the key is missing."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "must be a string")
        return value

    def texts(self, key: str) -> list[str]:
        """Returns a list of strings, empty if the key is missing."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "must be a list of strings")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """Returns a list of finite numbers. A missing key is an error."""
        value = self._get(key, None)
        if not isinstance(value, list) or not all(_finite(item) for item in value):
            raise self.wrong(key, "must be a list of numbers")
        return tuple(float(item) for item in value)

    def integers(self, key: str) -> list[int]:
        """Returns a list of whole numbers, empty if the key is missing."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.wrong(key, "must be a list of whole numbers")
        return value

    def inner(self, key: str) -> ConfigJson:
        """Returns the object at `key`, empty if the key is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "must be an object")
        return ConfigJson(f"{self.where}: {key}", value)

    def _get(self, key: str, default: Any) -> Any:
        self.seen.add(key)
        value = self.fields.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        return value


def _finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)


def read_config_json(directory: Path) -> ConfigJson:
    """Reads the config.json of a model directory. Raises ConfigError if it is missing, too large or no JSON object."""
    path = directory / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
        with path.open("rb") as file:
            if is_lfs_pointer(file):
                raise ConfigError(f"{path}: {lfs_advice(directory)}")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): is {directory} a model directory?") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return ConfigJson(str(path), fields)
