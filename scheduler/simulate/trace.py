"""Traces: requests with their arrival times, as files with one JSON object per line.

    {"at": 0.31, "adapter": "a17", "prompt": 380, "output": 120}
    {"at": 0.34, "adapter": null, "prompt": 900, "output": 40, "group": "g3", "prefix": 512, "tenant": "t1"}

Requests of one `group` share their first `prefix` prompt tokens; no other tokens are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from zlib import crc32

import msgspec

from engine.errors import ConfigError


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request: its time in seconds, its adapter (None: the base), and the tokens of its prompt and its output."""

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
        """Returns the prompt of request `number`: the shared tokens of its group, then its own tokens."""
        prefix = self.prefix if self.group is not None else 0
        shared = [1 << 31 | crc32((self.group or "").encode())] * prefix
        return shared + [number] * (self.prompt - prefix)


def read(path: Path) -> list[TraceRequest]:
    """Returns the requests of a file, sorted by time. Raises ConfigError, with the line number for an invalid line."""
    decoder = msgspec.json.Decoder(TraceRequest)
    requests: list[TraceRequest] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            requests += [decoder.decode(line)] if line.strip() else []
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    if not requests:
        raise ConfigError(f"{path}: holds no requests; scripts/make_trace.py writes some")
    return sorted(requests, key=lambda request: request.at)


def write(path: Path, requests: Iterable[TraceRequest]) -> None:
    """Writes the requests to a file, one per line."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as lines:
        lines.writelines(encoder.encode(request) + b"\n" for request in requests)


def rescale(requests: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """Returns the same requests with times scaled to `rate` requests per second on average."""
    factor = len(requests) / rate / max(requests[-1].at, 1e-9)
    return [msgspec.structs.replace(request, at=request.at * factor) for request in requests]


def hot_adapters(requests: Iterable[TraceRequest], count: int | None) -> set[str]:
    """Returns the `count` adapters with the most requests; None: the fewest that get half of all adapter requests."""
    busy = Counter(request.adapter for request in requests if request.adapter is not None)
    if count is not None:
        return {name for name, _ in busy.most_common(count)}
    hot: set[str] = set()
    left = sum(busy.values()) / 2
    for name, requested in busy.most_common():
        if left <= 0:
            break
        hot.add(name)
        left -= requested
    return hot
