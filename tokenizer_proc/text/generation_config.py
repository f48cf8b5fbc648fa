"""The model's default sampling parameters from generation_config.json, and the end ids, some of them from config.json.

A value that no request may have, such as a negative temperature, is refused by name when the file is read.

If a client leaves a value out, the file's value is used, or else a neutral one (temperature 1, no filter, no penalty).
`do_sample: false` in the file makes greedy decoding the default; otherwise sampling is, as OpenAI's clients expect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from engine.directory import Directory
from engine.errors import ConfigError
from engine.ipc import DECODE_ERRORS
from tokenizer_proc.text import files

GENERATION_NAME = "generation_config.json"

MAX_TEMPERATURE = 1000.0  # temperatures far above this make all tokens equally likely, and overflow float32
MAX_PENALTY = 1000.0  # the largest repetition penalty, which is a factor; the smallest one is 1 / MAX_PENALTY
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, MAX_TEMPERATURE),
    "top_p": (0, 1),
    "top_k": (-1, math.inf),
    "min_p": (0, 1),
    "repetition_penalty": (1 / MAX_PENALTY, MAX_PENALTY),
}
"""The least and the largest value of each sampling parameter that a file or a client may give."""

S = TypeVar("S", bound=msgspec.Struct)
_Ids = int | list[int] | None


class _Generation(msgspec.Struct):
    eos_token_id: _Ids = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class _Text(msgspec.Struct):
    eos_token_id: _Ids = None


class _Model(msgspec.Struct):
    eos_token_id: _Ids = None
    text_config: _Text | None = None


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The default sampling values, used where a client gives none, and the ids of the tokens that end the output."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    end_ids: list[int] = []

    @classmethod
    def load(cls, model_path: str | Path, eos_id: int | None = None) -> GenerationConfig:
        """Reads the config from the model's directory. `eos_id` is the tokenizer's end-of-sequence id.

        Raises ConfigError for files that cannot be read.
        """
        with files.open_directory(model_path) as directory:
            generation = _read(directory, GENERATION_NAME, _Generation)
            model = _read(directory, "config.json", _Model)
        groups = (
            _ids(generation.eos_token_id),
            _ids(model.eos_token_id),
            _ids(model.text_config.eos_token_id if model.text_config is not None else None),
            _ids(eos_id),
        )
        return cls(end_ids=list(dict.fromkeys(token for group in groups for token in group)), **_values(generation))

    def over(self, directory: Directory, kept: Sequence[int], eos_id: int | None, vocab_size: int) -> GenerationConfig:
        """Returns a copy of this config, overridden by the generation_config.json in `directory`, if there is one.

        Its end ids are `kept`, those of that file, and `eos_id`. Raises ConfigError, also for an end id of the file
        that is not in the vocabulary of `vocab_size` tokens.
        """
        generation = _read(directory, GENERATION_NAME, _Generation)
        for token in _ids(generation.eos_token_id):
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"{directory.path / GENERATION_NAME}: eos_token_id = {token} is not in the vocabulary of"
                    f" {vocab_size} tokens"
                )
        end_ids = list(dict.fromkeys([*kept, *_ids(generation.eos_token_id), *_ids(eos_id)]))
        return msgspec.structs.replace(self, end_ids=end_ids, **_values(generation))


def _values(generation: _Generation) -> dict[str, Any]:
    """Returns the sampling values that the file gives."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: value for name in names if (value := getattr(generation, name)) is not None}
    return values if generation.do_sample is not False else values | {"temperature": 0.0}


def _read(directory: Directory | None, name: str, type_: type[S]) -> S:
    most = files.MAX_GENERATION if type_ is _Generation else files.MAX_CONFIG
    raw = None if directory is None else files.read(directory, name, most)
    if directory is None or raw is None:
        return type_()
    try:
        found = msgspec.json.decode(raw, type=type_, strict=False)
    except DECODE_ERRORS as error:
        raise ConfigError(f"{directory.path / name} cannot be read: {error}") from error
    if isinstance(found, _Generation):
        _check_ranges(found, directory.path / name)
    return found


def _check_ranges(generation: _Generation, path: Path) -> None:
    """Raises ConfigError for a sampling value out of range."""
    for name, (low, high) in RANGES.items():
        value = getattr(generation, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{path}: {name} = {value} is not from {low:g} to {high:g}: correct or remove it")


def _ids(value: _Ids) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else value
