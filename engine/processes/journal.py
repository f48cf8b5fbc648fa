"""The journal of adapters: what names came to mean since the start, a line each, for whoever takes over.

The tokenizer process writes it; the launcher reads it when that process died. A line that was cut by the death of its
writer is left out. Knows nothing of what adapters hold.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.config.process_configs import AdapterSource
from engine.ipc import DECODE_ERRORS

log = logging.getLogger(__name__)


class NameBound(msgspec.Struct, frozen=True, tag=True):
    """From now on the source's name means it."""

    source: AdapterSource


class NameUnbound(msgspec.Struct, frozen=True, tag=True):
    """Nothing is called so any more."""

    name: str


_ENTRY: msgspec.json.Decoder[NameBound | NameUnbound] = msgspec.json.Decoder(NameBound | NameUnbound)


class Journal:
    """Appends entries to a file; without a path it keeps none."""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def means(self, source: AdapterSource) -> None:
        """The source's name means it."""
        self._write(NameBound(source))

    def drops(self, name: str) -> None:
        """The name means nothing."""
        self._write(NameUnbound(name))

    def _write(self, entry: NameBound | NameUnbound) -> None:
        if self._path is not None:
            with open(self._path, "ab") as file:
                file.write(msgspec.json.encode(entry) + b"\n")


def replay(path: Path, sources: Sequence[AdapterSource]) -> list[AdapterSource]:
    """What the names mean now that meant `sources` at the start."""
    meant = {source.name: source for source in sources}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = _ENTRY.decode(line)
        except DECODE_ERRORS:
            log.warning("a line of the journal of adapters cannot be read and is left out")
            continue
        if isinstance(entry, NameBound):
            meant[entry.source.name] = entry.source
        else:
            meant.pop(entry.name, None)
    return list(meant.values())
