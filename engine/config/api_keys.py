"""API keys: which requests over HTTP are accepted, for which tenant, and up to which rate.

    --api-key KEY ...        or CHORUS_API_KEY / VLLM_API_KEY: keys without rules, all of one tenant
    --api-key-file FILE      one JSON object a line, with rules; not visible in a process list

Keys do not appear in logs or in /server_info.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from engine.errors import ConfigError

VARIABLES = ("CHORUS_API_KEY", "VLLM_API_KEY")


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key and its rules.

    tenant               requests of different tenants share no prefix pages; the policy fair balances tenants
    adapters             patterns of allowed names, with * as in file names; all adapters of a mix must be allowed
    base                 whether the base model may be used without an adapter
    requests_per_minute  a rate, of prompts x n
    tokens_per_minute    the same for the tokens of prompt and completion
    operator             whether the key may see and abort every caller's requests, and change adapters where there is
                         no admin key
    """

    key: str
    tenant: str = ""
    adapters: list[str] = msgspec.field(default_factory=lambda: ["*"])
    base: bool = True
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    operator: bool = False

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            rate = getattr(self, name)
            if rate is not None and not 1 <= rate < float("inf"):
                raise ValueError(f"{name} must be at least 1")
        if self.operator and ("*" not in self.adapters or not self.base):
            raise ValueError("an operator may use every model: leave `adapters` and `base` out, or `operator`")


def read_keys(given: Sequence[str], file: str | None, environment: Mapping[str, str] = os.environ) -> list[ApiKey]:
    """Returns the keys of flags, file and environment. Raises ConfigError for an invalid key or one given twice."""
    plain = [*given, *(key for name in VARIABLES for key in re.split(r"[\s,]+", environment.get(name, "")) if key)]
    keys = [ApiKey(key=key) for key in dict.fromkeys(plain)] + ([] if file is None else _from_file(Path(file)))
    for number, one in enumerate(keys):
        if not one.key or not one.key.isascii() or not one.key.isprintable() or " " in one.key:
            raise ConfigError("an API key must be printable ASCII without spaces, and not empty")
        if any(one.key == other.key for other in keys[:number]):
            raise ConfigError("--api-key-file: a key is given twice; a key has one set of rules")
    return keys


def _from_file(path: Path) -> list[ApiKey]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: cannot be read ({error})") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                keys.append(msgspec.json.decode(line, type=ApiKey))
            except msgspec.MsgspecError as error:
                raise ConfigError(f"--api-key-file {path}, line {number}: {error}") from error
    if not keys:
        raise ConfigError(f"--api-key-file {path}: holds no key")
    return keys
