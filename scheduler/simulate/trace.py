"""What is asked and when: one JSON object a line. Knows nothing of how traces are made or served.

    {"at": 0.31, "adapter": "a17", "prompt": 380, "output": 120}
    {"at": 0.34, "adapter": null, "prompt": 900, "output": 40, "group": "g3", "prefix": 512, "tenant": "t1"}

Requests of one `group` share their first `prefix` prompt tokens; all other tokens are nobody else's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from zlib import crc32

import msgspec

from engine.errors import ConfigError


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request: when it comes (seconds), for which adapter, how long its prompt and answer are (tokens)."""

    at: float
    adapter: str | None
    prompt: int
    output: int
    group: str | None = None
    prefix: int = 0
    tenant: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.at < float("inf")):
            raise ValueError("`at` must be seconds from the start")
        if self.prompt < 1 or self.output < 1:
            raise ValueError("`prompt` and `output` must be at least 1")
        if not 0 <= self.prefix <= self.prompt:
            raise ValueError("`prefix` must be at most `prompt`")

    def tokens(self, number: int) -> list[int]:
        """The prompt of request `number`: the group's tokens, then its own."""
        prefix = self.prefix if self.group is not None else 0
        shared = [1 << 31 | crc32((self.group or "").encode())] * prefix
        return shared + [number] * (self.prompt - prefix)


def read(path: Path) -> list[Ask]:
    """The requests of a file, by time. Raises ConfigError that names the line."""
    decoder = msgspec.json.Decoder(Ask)
    asks: list[Ask] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            asks += [decoder.decode(line)] if line.strip() else []
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    if not asks:
        raise ConfigError(f"{path}: holds no requests; scripts/make_trace.py writes some")
    return sorted(asks, key=lambda ask: ask.at)


def write(path: Path, asks: Iterable[Ask]) -> None:
    """Writes them, one a line."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as lines:
        lines.writelines(encoder.encode(ask) + b"\n" for ask in asks)


def rescale(asks: Sequence[Ask], rate: float) -> list[Ask]:
    """The same requests in the same order, at `rate` requests a second on average."""
    factor = len(asks) / rate / max(asks[-1].at, 1e-9)
    return [msgspec.structs.replace(ask, at=ask.at * factor) for ask in asks]


def hot_adapters(asks: Iterable[Ask], count: int | None) -> set[str]:
    """The busiest `count` adapters; None: the busiest of all that together get half of the requests for adapters."""
    busy = Counter(ask.adapter for ask in asks if ask.adapter is not None)
    if count is not None:
        return {name for name, _ in busy.most_common(count)}
    hot: set[str] = set()
    left = sum(busy.values()) / 2
    for name, requests in busy.most_common():
        if left <= 0:
            break
        hot.add(name)
        left -= requests
    return hot
