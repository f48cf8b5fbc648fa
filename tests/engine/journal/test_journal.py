"""The journal's files: what a reader makes of them after writes that were cut off, and of damage."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import pytest

from engine.config.process_configs import AdapterSource
from engine.errors import InternalError, StorageFailed
from engine.journal.journal import Journal
from engine.journal.memory_file import MemoryFile


def source(name: str, number: int = 1, **fields: object) -> AdapterSource:
    return AdapterSource(adapter_id=number, name=name, path="p", root="/p", **fields)  # type: ignore[arg-type]


@pytest.fixture
def files() -> Iterator[list[MemoryFile]]:
    """The files of a journal in which `a` has its name."""
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(MemoryFile.created("adapters")) for _ in range(2)]
        Journal.create(files, [source("a")])
        yield files


def names(files: list[MemoryFile]) -> dict[str, int]:
    return {each.name: each.adapter_id for each in Journal(files).sources}


def test_a_reader_finds_every_change(files: list[MemoryFile]) -> None:
    journal = Journal(files)
    journal.bind(source("b", 2, pinned=True, roots=["/r"], revision="r"))
    journal.bind(source("a", 3))
    journal.unbind("a")
    journal.unbind("never bound")
    assert Journal(files).sources == journal.sources == [source("b", 2, pinned=True, roots=["/r"], revision="r")]


def test_a_line_that_was_cut_off_is_written_over(files: list[MemoryFile]) -> None:
    Journal(files).bind(source("b", 2))
    whole = files[0].read()
    for cut in range(1, 40):
        files[0].truncate(0)
        files[0].write(whole[:-cut], 0)
        assert names(files) == {"a": 1}
        Journal(files).bind(source("c", 3))
        assert names(files) == {"a": 1, "c": 3}


def test_a_damaged_record_is_told_and_not_skipped(files: list[MemoryFile]) -> None:
    Journal(files).bind(source("b", 2))
    whole = files[0].read()
    first = whole.index(b"\n")
    for at in (0, 8, first - 3, first, first + 12):
        files[0].write(bytes([whole[at] ^ 1]), at)
        with pytest.raises(InternalError, match="the journal of adapters is damaged"):
            Journal(files)
        files[0].write(whole, 0)
    assert names(files) == {"a": 1, "b": 2}


def test_memory_that_runs_out_is_a_503_and_changes_nothing(files: list[MemoryFile]) -> None:
    """The limit on file sizes cuts the write off in the middle, as a full memory does."""
    journal, before = Journal(files), files[0].read()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(StorageFailed, match=r"nothing was changed.*File too large.*free memory") as failure:
            journal.bind(source("b", 2))
        with pytest.raises(StorageFailed):
            journal.unbind("a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failure.value.status == 503
    assert files[0].read() == before
    journal.bind(source("c", 3))
    assert names(files) == {"a": 1, "c": 3}
