"""The journal of adapters: a JSON line each time a name was bound to an adapter or unbound since the start.

The tokenizer process writes the journal; when that process has died, the launcher reads it for the next incarnation. A
line that was cut off because the writer died is skipped.
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
    """Entry: `source.name` is bound to this adapter from now on."""

    source: AdapterSource


class NameUnbound(msgspec.Struct, frozen=True, tag=True):
    """Entry: `name` is bound to no adapter from now on."""

    name: str


_ENTRY: msgspec.json.Decoder[NameBound | NameUnbound] = msgspec.json.Decoder(NameBound | NameUnbound)


class Journal:
    """Appends entries to the file at `path`; does nothing when `path` is None."""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def bind(self, source: AdapterSource) -> None:
        """Records that `source.name` is bound to this adapter."""
        self._write(NameBound(source))

    def unbind(self, name: str) -> None:
        """Records that `name` is no longer bound to an adapter."""
        self._write(NameUnbound(name))

    def _write(self, entry: NameBound | NameUnbound) -> None:
        if self._path is not None:
            with open(self._path, "ab") as file:
                file.write(msgspec.json.encode(entry) + b"\n")


def replay(path: Path, sources: Sequence[AdapterSource]) -> list[AdapterSource]:
    """Returns the adapters that have a name now: the `sources` given at the start, changed by the journal's entries."""
    bound = {source.name: source for source in sources}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = _ENTRY.decode(line)
        except DECODE_ERRORS:
            log.warning("a line of the journal of adapters cannot be read and is skipped")
            continue
        if isinstance(entry, NameBound):
            bound[entry.source.name] = entry.source
        else:
            bound.pop(entry.name, None)
    return list(bound.values())
