"""The journal of adapters: every change of a name is written to it before the change takes effect.

The launcher creates the journal's two files in memory, so they cannot run out of disk and nobody can delete them, and
they live exactly as long as they are of use: a successor of the tokenizer process is started by the same launcher. As
long as the launcher lives the kernel keeps what was written, so there is nothing to sync.

When the file in use has grown to several times what is bound, a snapshot is written to the other one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from engine.config.process_configs import AdapterSource
from engine.errors import InternalError, StorageFailed
from engine.journal import records
from engine.journal.memory_file import MemoryFile
from engine.journal.records import NameBound, NameUnbound, Record, Snapshot

log = logging.getLogger(__name__)

COMPACT_BYTES = 64 << 10
"""The size from which a file is compacted."""
COMPACT_FACTOR = 4
"""How many times larger than its snapshot a file becomes before it is compacted."""


class Journal:
    """Records changes in `files`, as `create` or a predecessor left them; without files, does nothing.

    Raises InternalError if the files are damaged or cannot be read.
    """

    def __init__(self, files: Sequence[MemoryFile] = ()) -> None:
        self._files = list(files)
        self._broken = False
        if files:
            self._index, self._number, self._end, self._bound = records.read(_contents(files))
            self._compact_at = self._next_size()

    @classmethod
    def create(cls, files: Sequence[MemoryFile], sources: Sequence[AdapterSource]) -> None:
        """Writes to the empty `files` that each of the `sources` has its name. Raises StorageFailed."""
        try:
            files[0].write(records.encode(Snapshot(0, list(sources))), 0)
        except OSError as error:
            raise StorageFailed(f"there is no memory for the journal of adapters ({error.strerror})") from error

    @property
    def sources(self) -> list[AdapterSource]:
        """The adapters that have a name now."""
        return list(self._bound.values())

    def bind(self, source: AdapterSource) -> None:
        """Records that `source.name` is bound to this adapter. Raises StorageFailed, and then nothing is recorded."""
        self._append(NameBound(source))

    def unbind(self, name: str) -> None:
        """Records that `name` is no longer bound to an adapter. Raises StorageFailed, and then nothing is recorded."""
        self._append(NameUnbound(name))

    def _append(self, record: NameBound | NameUnbound) -> None:
        if not self._files:
            return
        self._end = self._store(self._index, record, self._end)
        match record:
            case NameBound(source):
                self._bound[source.name] = source
            case NameUnbound(name):
                self._bound.pop(name, None)
        if self._end >= self._compact_at:
            self._compact()

    def _store(self, index: int, record: Record, offset: int) -> int:
        """Writes a record and returns its end. Raises StorageFailed if a reader does not find it."""
        if self._broken:
            raise _failure("an earlier change was written in part and could not be taken back")
        file, line = self._files[index], records.encode(record)
        try:
            file.write(line, offset)
        except OSError as error:
            if not self._is_stored(file, line, offset):
                raise _failure(error.strerror or str(error)) from error
        return offset + len(line)

    def _is_stored(self, file: MemoryFile, line: bytes, offset: int) -> bool:
        """Takes a write that failed back. Returns whether that failed too and a reader finds the whole line."""
        with contextlib.suppress(OSError):
            file.truncate(offset)
            return False
        try:
            return file.read()[offset : offset + len(line)] == line
        except OSError:
            self._broken = True  # whether a successor will find the line is not known
            return False

    def _compact(self) -> None:
        """Writes a snapshot to the other file and uses that file from now on. A failure changes nothing."""
        unused, used = 1 - self._index, self._index
        try:
            self._files[unused].truncate(0)
            self._end = self._store(unused, Snapshot(self._number + 1, self.sources), 0)
        except (OSError, StorageFailed) as error:
            log.warning("the journal of adapters could not be compacted and grows on: %s", error)
            self._compact_at = 2 * self._end
            return
        self._index, self._number = unused, self._number + 1
        self._compact_at = self._next_size()
        with contextlib.suppress(OSError):  # the higher number counts in any case
            self._files[used].truncate(0)

    def _next_size(self) -> int:
        snapshot = len(records.encode(Snapshot(self._number, self.sources)))
        return max(COMPACT_BYTES, COMPACT_FACTOR * snapshot)


def _contents(files: Sequence[MemoryFile]) -> list[bytes]:
    try:
        return [file.read() for file in files]
    except OSError as error:
        raise InternalError(f"the journal of adapters cannot be read ({error.strerror})") from error


def _failure(reason: str) -> StorageFailed:
    return StorageFailed(
        f"nothing was changed, because the change could not be recorded ({reason}): free memory on the server, then"
        " send the call again"
    )
