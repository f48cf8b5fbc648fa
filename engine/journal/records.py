"""The records of the journal, and their form in its files.

    file      Snapshot, then one record for each change since            a line is checksum, space, JSON, newline
    files     two: a snapshot is written to the one that is not in use, which is used from then on

A record counts once its newline is there. What follows the last newline is a write that failed or was cut off, and the
next record is written over it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from engine.config.process_configs import AdapterSource
from engine.errors import InternalError
from engine.ipc import DECODE_ERRORS


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """The first record of a file: all that is bound. The file with the higher `number` is in use."""

    number: int
    sources: list[AdapterSource]


class NameBound(msgspec.Struct, frozen=True, tag=True):
    """`source.name` is bound to this adapter from now on."""

    source: AdapterSource


class NameUnbound(msgspec.Struct, frozen=True, tag=True):
    """`name` is bound to no adapter from now on."""

    name: str


Record = Snapshot | NameBound | NameUnbound
Bindings = dict[str, AdapterSource]
"""The adapters that have a name, by name."""

_DECODER: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


class Content(NamedTuple):
    """What the files say: the index of the `used` one, its snapshot's `number`, the `end` of its last record."""

    used: int
    number: int
    end: int
    bound: Bindings


def encode(record: Record) -> bytes:
    """Returns the line of a record."""
    data = msgspec.json.encode(record)
    return b"%08x %b\n" % (zlib.crc32(data), data)


def read(files: Sequence[bytes]) -> Content:
    """Returns what the contents of the journal's files say.

    Raises InternalError if a record is damaged, because the names that it was about are not known then.
    """
    found = [content for index, data in enumerate(files) if (content := _read_file(index, data)) is not None]
    if not found:
        raise InternalError("the journal of adapters is empty")
    return max(found, key=lambda content: content.number)


def _read_file(index: int, data: bytes) -> Content | None:
    """Returns what one file says, or None if its snapshot is not complete."""
    end = data.rfind(b"\n") + 1
    if not end:
        return None
    snapshot, *changes = [_decode(line) for line in data[: end - 1].split(b"\n")]
    if not isinstance(snapshot, Snapshot):
        raise InternalError("the journal of adapters is damaged: its snapshot is missing")
    bound: Bindings = {source.name: source for source in snapshot.sources}
    for change in changes:
        match change:
            case NameBound():
                bound[change.source.name] = change.source
            case NameUnbound():
                bound.pop(change.name, None)
            case Snapshot():
                raise InternalError("the journal of adapters is damaged: it has a snapshot too many")
    return Content(index, snapshot.number, end, bound)


def _decode(line: bytes) -> Record:
    checksum, _, data = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(data):
        raise InternalError("the journal of adapters is damaged: a checksum is wrong")
    try:
        return _DECODER.decode(data)
    except DECODE_ERRORS as error:
        raise InternalError(f"the journal of adapters is damaged: {error}") from error
