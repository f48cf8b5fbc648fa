"""A stream to a stalled, full or closed descriptor never blocks or raises; what it drops is counted."""

from __future__ import annotations

import fcntl
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import engine
from engine import logs
from engine.logs import BoundedStream

LINE = "x" * 99 + "\n"


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    """The ends of a small pipe; a test closes an end by taking it out."""
    ends = list(os.pipe())
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for end in ends:
        os.close(end)


def _read(descriptor: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data += os.read(descriptor, 1 << 16)
    return data


def test_lines_are_kept_in_order(pipe: list[int]) -> None:
    stream = BoundedStream(pipe[1])
    for number in range(2000):
        print("line", number, file=stream)
    print("end", end="", file=stream, flush=True)
    assert _read(pipe[0], b"end").decode() == "".join(f"line {number}\n" for number in range(2000)) + "end"
    assert stream.drain(10)


def test_a_stalled_reader_blocks_nothing_and_drops_are_told(pipe: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_PENDING", 50_000)
    stream = BoundedStream(pipe[1])
    for _ in range(10_000):
        stream.write(LINE)
    assert not stream.drain(0.05)
    assert stream._bytes <= 50_000
    data = b""
    while data.count(LINE.encode()) + sum(map(int, re.findall(rb"\((\d+) lines", data))) < 10_000:
        data += os.read(pipe[0], 1 << 16)
    assert len(data) < 150_000, "most lines were dropped"
    stream.write("it flows again\n")
    assert _read(pipe[0], b"again\n") == b"it flows again\n"


def test_a_full_or_closed_descriptor_drops_and_counts() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    stream = BoundedStream(full)
    for _ in range(5):
        stream.write(LINE)
    assert stream.drain(10)
    assert stream._dropped == 5
    read_end, write_end = os.pipe()
    os.dup2(write_end, full)
    stream.write("there is room again\n")
    assert _read(read_end, b"again\n") == b"(5 lines were dropped here, as nothing took them)\nthere is room again\n"
    os.close(read_end)
    for _ in range(3):
        stream.write(LINE)
    assert stream.drain(10)
    assert stream._dropped == 3
    for descriptor in (full, write_end):
        os.close(descriptor)


def test_a_nonblocking_descriptor_is_waited_for(pipe: list[int]) -> None:
    os.set_blocking(pipe[1], False)
    stream = BoundedStream(pipe[1])
    for _ in range(500):
        stream.write(LINE)
    data = b""
    while len(data) < 500 * len(LINE):
        data += os.read(pipe[0], 1 << 16)
    assert data.decode() == 500 * LINE


def test_characters_outside_the_encoding_are_escaped(pipe: list[int]) -> None:
    stream = BoundedStream(pipe[1], "ascii")
    print("zwölf \ud800", file=stream)
    assert _read(pipe[0], b"\n") == b"zw\\xf6lf \\ud800\n"


def test_unfinished_line_is_bounded(pipe: list[int]) -> None:
    stream = BoundedStream(pipe[1])
    stream.write("y" * (logs.MAX_LINE + 1))
    assert stream._line == ""
    data = b""
    while len(data) <= logs.MAX_LINE:
        data += os.read(pipe[0], 1 << 16)


def test_lines_are_kept_while_no_thread_can_be_started(pipe: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    stream = BoundedStream(pipe[1])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        print("the process cannot start", file=stream)
        assert stream.drain(10)
        assert _read(pipe[0], b"\n") == b"the process cannot start\n"
        stream.write(100 * LINE)
        assert not stream.drain(0), "the pipe takes a part"
    stream.write("a thread again\n")
    assert _read(pipe[0], b"again\n").decode() == 100 * LINE + "a thread again\n"


def test_stream_is_a_text_stream() -> None:
    stream = BoundedStream(1)
    assert isinstance(stream, io.TextIOBase)
    assert stream.writable()
    assert stream.fileno() == 1
    assert stream.encoding == "utf-8"


PROGRAM = """
import os, sys
import engine
from engine import logs
logs.open_descriptors()
logs.take_over()
logs.setup("test", "info")
first = os.open(os.devnull, os.O_RDONLY)
import logging
for number in range(20000):
    logging.info("line %d of the log", number)
print("done")
os._exit(0) if first > 2 and "exit" in sys.argv else sys.exit(0 if first > 2 else 9)
"""


@pytest.mark.parametrize("stdio", ["<&- >&- 2>&-", ">/dev/full 2>&1", "2>&1 | true", "2>&1 | sleep 100"])
def test_program_ends_whatever_its_stdio_is(stdio: str) -> None:
    """A process with a pipe that nobody reads ends with its work done, a second later at most."""
    script = f"{{ '{sys.executable}' -c '{PROGRAM}'; echo $? >&3; }} {stdio}"
    read_end, write_end = os.pipe()
    script = script.replace(">&3", f">&{write_end}")
    shell = subprocess.Popen(["bash", "-c", script], pass_fds=(write_end,), start_new_session=True)
    os.close(write_end)
    try:
        assert os.read(read_end, 100) == b"0\n"
    finally:
        os.close(read_end)
        os.killpg(shell.pid, 9)
        shell.wait()


def test_only_leave_ends_a_process_at_once() -> None:
    """os._exit alone ends the thread that writes the log. The check of tokenizers has no such thread."""
    root = Path(engine.__path__[0]).parent
    packages = ("engine", "scheduler", "tokenizer_proc", "model_runner")
    found = {
        str(path.relative_to(root))
        for package in packages
        for path in (root / package).rglob("*.py")
        if "os._exit(" in path.read_text()
    }
    assert found == {"engine/processes/child.py", "tokenizer_proc/text/checking/check_worker.py"}
