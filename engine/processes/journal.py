"""The journal of adapters: one JSON line for each name that was bound to an adapter or unbound since the start.

The tokenizer process writes it; after that process died the launcher reads it for the next incarnation. A line cut off
by the writer's death is skipped. Knows nothing of what adapters contain.
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
    """`source.name` names this adapter from now on."""

    source: AdapterSource


class NameUnbound(msgspec.Struct, frozen=True, tag=True):
    """`name` names no adapter from now on."""

    name: str


_ENTRY: msgspec.json.Decoder[NameBound | NameUnbound] = msgspec.json.Decoder(NameBound | NameUnbound)


class Journal:
    """Appends entries to the file at `path`; does nothing when `path` is None."""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def bind(self, source: AdapterSource) -> None:
        """Records that `source.name` names this adapter."""
        self._write(NameBound(source))

    def unbind(self, name: str) -> None:
        """Records that `name` names no adapter."""
        self._write(NameUnbound(name))

    def _write(self, entry: NameBound | NameUnbound) -> None:
        if self._path is not None:
            with open(self._path, "ab") as file:
                file.write(msgspec.json.encode(entry) + b"\n")


def replay(path: Path, sources: Sequence[AdapterSource]) -> list[AdapterSource]:
    """The adapters by name now, given the `sources` at the start."""
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
