"""What the model itself says about generating: generation_config.json, and the end ids of config.json.

A value the client leaves out is the file's, where it has one, else neutral (temperature 1, no filter, no penalty).
`do_sample: false` makes greedy the default; a file that is silent about it samples, as OpenAI's clients expect.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from engine.errors import ConfigError
from engine.ipc import UNREADABLE

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


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling values for what a client leaves out, and the ids that end an answer."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    end_ids: list[int] = []

    @classmethod
    def load(cls, model_path: str | Path, eos_id: int | None = None) -> Defaults:
        """From the model's directory; `eos_id` is the tokenizer's. Raises ConfigError on nonsense in the files."""
        generation = _read(Path(model_path) / "generation_config.json", _Generation)
        model = _read(Path(model_path) / "config.json", _Model)
        values = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(generation, name)) is not None
        }
        if generation.do_sample is False:
            values["temperature"] = 0.0
        groups = (
            _ids(generation.eos_token_id),
            _ids(model.eos_token_id),
            _ids(model.text_config.eos_token_id if model.text_config is not None else None),
            _ids(eos_id),
        )
        return cls(end_ids=list(dict.fromkeys(token for group in groups for token in group)), **values)


def _read(path: Path, type_: type[S]) -> S:
    if not path.is_file():
        return type_()
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_, strict=False)
    except (*UNREADABLE, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _ids(value: _Ids) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else value
