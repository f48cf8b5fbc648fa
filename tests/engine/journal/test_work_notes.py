"""Notes of work in progress: what ended a process is tried once more alone, then refused; sound work is cleared."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import pytest

from engine.errors import InvalidRequest
from engine.journal.memory_file import MemoryFile
from engine.journal.work_notes import RECORDS, SLOTS, WorkNotes, digest

DEAD: list[contextlib.AbstractContextManager[None]] = []  # the work of dead processes, which ends with the test
A, B, C = (digest([name]) for name in (b"a", b"b", b"c"))


@pytest.fixture
def file() -> Iterator[MemoryFile]:
    made = WorkNotes.new_file()
    assert made is not None
    yield made
    while DEAD:
        DEAD.pop().__exit__(None, None, None)
    os.close(made.descriptor)


def dies_at(file: MemoryFile, *work: bytes, after_fault: bool = False) -> None:
    """Has a process take over and die while it is at `work`. `after_fault` tells how its predecessor died."""
    notes = WorkNotes(file, after_fault)
    for each in work:
        never_left = notes.working(each)
        never_left.__enter__()
        DEAD.append(never_left)
    assert WorkNotes.is_work_noted(file) == bool(work)


def refused(notes: WorkNotes, work: bytes) -> bool:
    code = ""
    try:
        with notes.working(work):
            pass
    except InvalidRequest as error:
        code = error.code or ""
    return code == "poison_request"


def test_work_that_ends_leaves_no_note(file: MemoryFile) -> None:
    notes = WorkNotes(file)
    with notes.working(A), notes.working(B):
        assert WorkNotes.is_work_noted(file)
    assert not WorkNotes.is_work_noted(file)
    with pytest.raises(ZeroDivisionError), notes.working(A):
        _ = 1 / 0
    assert not WorkNotes.is_work_noted(file)
    assert not refused(WorkNotes(file, after_fault=True), A)


def test_work_at_which_a_process_fails_is_refused(file: MemoryFile) -> None:
    dies_at(file, A)
    notes = WorkNotes(file, after_fault=True)
    assert not WorkNotes.is_work_noted(file)
    assert refused(notes, A)
    assert not refused(notes, B)
    assert refused(WorkNotes(file), A), "it is refused for good"


def test_work_at_which_a_process_is_killed_is_tried_again(file: MemoryFile) -> None:
    dies_at(file, A)
    dies_at(file, A)
    assert refused(WorkNotes(file), A)
    assert not refused(WorkNotes(file), B)


def test_sound_work_at_which_a_process_was_killed_is_cleared(file: MemoryFile) -> None:
    dies_at(file, A)
    assert not refused(WorkNotes(file), A)
    dies_at(file, A)
    assert not refused(WorkNotes(file), A)


def test_several_suspects_are_tried_one_at_a_time(file: MemoryFile) -> None:
    dies_at(file, A, B)
    notes, inside, go = WorkNotes(file, after_fault=True), threading.Semaphore(0), threading.Semaphore(0)
    at_once, most = 0, 0

    def work(each: bytes) -> None:
        nonlocal at_once, most
        with notes.working(each):
            at_once += 1
            most = max(most, at_once)
            inside.release()
            assert go.acquire(timeout=20)
            at_once -= 1

    threads = [threading.Thread(target=work, args=(each,)) for each in (A, B)]
    for thread in threads:
        thread.start()
    assert inside.acquire(timeout=20)
    other = threading.Thread(target=work, args=(C,))
    other.start()
    assert not inside.acquire(timeout=0.05)
    go.release(3)
    for thread in (*threads, other):
        thread.join(20)
    assert most == 1
    with notes.working(A), notes.working(B):  # both passed
        assert not refused(notes, C)


def test_the_one_of_several_that_ends_processes_is_found(file: MemoryFile) -> None:
    dies_at(file, A, B)
    dies_at(file, B, after_fault=True)
    notes = WorkNotes(file, after_fault=True)
    assert refused(notes, B)
    assert not refused(notes, A)


def test_more_work_than_slots_and_records_is_bounded(file: MemoryFile) -> None:
    for number in range(RECORDS + 20):
        dies_at(file, digest([b"%d" % number]), after_fault=True)
    notes = WorkNotes(file, after_fault=True)
    assert refused(notes, digest([b"%d" % (RECORDS + 19)]))
    assert not refused(notes, digest([b"0"]))
    entered = [notes.working(digest([b"x%d" % number])) for number in range(SLOTS + 5)]
    for each in entered:
        each.__enter__()
    for each in entered:
        each.__exit__(None, None, None)
    assert not WorkNotes.is_work_noted(file)


def test_the_parts_of_a_digest_are_told_apart() -> None:
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"]) != digest([b"abc"])
