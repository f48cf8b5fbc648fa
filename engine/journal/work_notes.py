"""Notes of the callers' work that the tokenizer process has begun, by which its successor knows what ended it.

    before work begins    its digest is noted, and struck out when it ends, however it ends
    the process dies      one digest is noted:  it gets a strike, two after a fault of the process itself
                          several are noted:    each is a suspect
    a suspect's work      runs while no other noted work does; when it ends, the suspicion and the strikes end too
    two strikes           the work is refused from then on

The notes are in memory that the launcher holds, so they outlive the process. A kill from outside may hit sound work;
that costs it a strike, which ends when the work does. A death at noted work is not counted against the launch.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Iterator

from engine.errors import InvalidRequest
from engine.journal.memory_file import MemoryFile

log = logging.getLogger(__name__)

SLOTS = 64
"""The most work that is noted at once. Work beyond that is not noted."""
RECORDS = 512
"""The number of digests with strikes or a suspicion that are kept, the newest ones."""
STRIKES = 2

_DIGEST = 16
_ENTRY = struct.Struct(f"<BB{_DIGEST}s")  # of a slot: is it used, 0, digest; of a record: is it used, strikes, digest
_SIZE = _ENTRY.size * (SLOTS + RECORDS)


def digest(parts: Iterable[bytes]) -> bytes:
    """Returns the digest of a piece of work, which `parts` describe."""
    found = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


class WorkNotes:
    """The notes in `file`, as a predecessor left them. Without a file they end with this object.

    `after_fault`: the predecessor ended by its own fault, not by a kill.
    """

    def __init__(self, file: MemoryFile | None = None, after_fault: bool = False) -> None:
        self._memory = bytearray(_SIZE) if file is None else mmap.mmap(file.descriptor, _SIZE)
        self._strikes: dict[bytes, int] = dict(self._entries(SLOTS, SLOTS + RECORDS))
        self._changed = threading.Condition()
        self._free = list(range(SLOTS))
        self._running = 0
        self._waiting = 0  # suspects that wait until no other noted work runs
        self._judge(after_fault)

    @staticmethod
    def new_file() -> MemoryFile | None:
        """Returns a file with room for the notes, or None if there is no memory or descriptor for one.

        The file is never closed: it lives as long as this process.
        """
        try:
            file = MemoryFile(os.memfd_create("work", os.MFD_CLOEXEC))
            file.truncate(_SIZE)
        except OSError as error:
            log.warning("a request that ends the tokenizer process will not be known (%s)", error.strerror)
            return None
        return file

    @staticmethod
    def is_work_noted(file: MemoryFile) -> bool:
        """Returns whether the process that wrote the notes has begun work that has not ended."""
        content = file.read()
        return any(content[at] for at in range(0, _ENTRY.size * SLOTS, _ENTRY.size))

    @contextlib.contextmanager
    def working(self, work: bytes) -> Iterator[None]:
        """While entered, the work with the digest `work` is noted. Blocks a suspect until no other noted work runs.

        Raises InvalidRequest for work that has ended the process before.
        """
        is_suspect = self._enter(work)
        slot = self._note(work)
        try:
            yield
        finally:
            self._leave(work, slot, is_suspect)

    def _enter(self, work: bytes) -> bool:
        """Waits until the work may run. Returns whether it is a suspect."""
        with self._changed:
            strikes = self._strikes.get(work)
            if strikes is None:
                self._changed.wait_for(lambda: not self._waiting)
                self._running += 1
                return False
            if strikes >= STRIKES:
                raise InvalidRequest(
                    "this request ended the process that reads requests before, so it is not tried again",
                    code="poison_request",
                )
            self._waiting += 1
            self._changed.wait_for(lambda: not self._running)
            self._running += 1
            return True

    def _leave(self, work: bytes, slot: int | None, is_suspect: bool) -> None:
        with self._changed:
            if slot is not None:
                self._write(slot, b"", 0)
                self._free.append(slot)
            self._running -= 1
            if is_suspect:
                self._waiting -= 1
                if self._strikes.pop(work, None) is not None:
                    self._write_records()
            self._changed.notify_all()

    def _note(self, work: bytes) -> int | None:
        with self._changed:
            slot = self._free.pop() if self._free else None
            if slot is not None:
                self._write(slot, work, 0)
            return slot

    def _judge(self, after_fault: bool) -> None:
        """Gives strikes for the work at which the predecessor ended, and strikes it out."""
        noted = {work for work, _ in self._entries(0, SLOTS)}
        for work in noted:
            alone = len(noted) == 1
            now = self._strikes.pop(work, 0) + ((STRIKES if after_fault else 1) if alone else 0)
            self._strikes[work] = now
            fate = "it is refused from now on" if now >= STRIKES else "it is tried again while no other long work runs"
            log.warning("the tokenizer process ended at the work with the digest %s: %s", work.hex(), fate)
        self._write_records()
        for slot in range(SLOTS):
            self._write(slot, b"", 0)

    def _entries(self, start: int, stop: int) -> Iterator[tuple[bytes, int]]:
        for place in range(start, stop):
            is_used, strikes, work = _ENTRY.unpack_from(self._memory, place * _ENTRY.size)
            if is_used:
                yield work, strikes

    def _write(self, place: int, work: bytes, strikes: int) -> None:
        _ENTRY.pack_into(self._memory, place * _ENTRY.size, bool(work), strikes, work)

    def _write_records(self) -> None:
        self._strikes = dict(list(self._strikes.items())[-RECORDS:])
        records = [*self._strikes.items()]
        for place in range(RECORDS):
            work, strikes = records[place] if place < len(records) else (b"", 0)
            self._write(SLOTS + place, work, min(strikes, 255))
