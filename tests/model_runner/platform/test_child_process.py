"""A ChildProcess: its config and environment, how it ends, and the description of its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from fixtures.processes.watched import runs, wait_for

from model_runner.platform.child_process import ChildProcess

CHILD = """
import json, os, signal, subprocess, sys
assert sys.flags.safe_path
config = json.loads(sys.stdin.readline())
print("a stray print")
grandchild = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL) if config["starts_process"] else None
os.write(config["pipe"], f"{grandchild.pid if grandchild else 0} {os.environ['OMP_NUM_THREADS']}".encode())
left = len(sys.stdin.read())
if config["ignores_stop"]:
    signal.pause()
sys.exit(3 + left)
"""


class Config(msgspec.Struct):
    pipe: int
    ignores_stop: bool = False
    starts_process: bool = False


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]) -> Callable[..., ChildProcess]:
    """Returns a function that starts a child process from CHILD."""
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def started(*, leads_group: bool = False, ignores_stop: bool = False, starts_process: bool = False) -> ChildProcess:
        return ChildProcess("a_child", Config(pipe[1], ignores_stop, starts_process), pipe[1], leads_group=leads_group)

    return started


def test_child_gets_its_config_and_ends_with_its_stdin(
    start: Callable[..., ChildProcess], pipe: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    child = start()
    assert os.read(pipe[0], 100) == b"0 1"
    assert child.is_running
    assert child.exit_text == "does not end"
    child._lifeline.close()
    child.wait()
    assert child.exit_text == "ended with status 3"
    child.kill(0)
    assert child.exit_text == "ended with status 3"
    assert capfd.readouterr().out == ""


def test_group_leader_is_killed_with_its_processes(start: Callable[..., ChildProcess], pipe: tuple[int, int]) -> None:
    child = start(leads_group=True, starts_process=True)
    started = int(os.read(pipe[0], 100).split()[0])
    assert runs(started)
    child.kill(10)
    assert not child.is_running
    assert child.exit_text == "was killed by signal 9"
    wait_for(lambda: not runs(started))


def test_child_without_a_group_is_killed_alone(start: Callable[..., ChildProcess], pipe: tuple[int, int]) -> None:
    child = start()
    os.read(pipe[0], 100)
    assert os.getpgid(child.pid) == os.getpgid(0)
    child.kill(10)
    assert child.exit_text == "was killed by signal 9"


@pytest.mark.parametrize(("ignores_stop", "end"), [(False, "ended with status 3"), (True, "was killed by signal 9")])
def test_stop_ends_a_child_unless_it_ignores_it(
    start: Callable[..., ChildProcess], pipe: tuple[int, int], ignores_stop: bool, end: str
) -> None:
    child = start(ignores_stop=ignores_stop)
    os.read(pipe[0], 100)
    child.stop()
    child.wait(0.2 if ignores_stop else 30)
    assert child.is_running == ignores_stop
    child.kill(10)
    assert child.exit_text == end


def test_killed_child_is_reaped_though_it_was_not_waited_for(
    start: Callable[..., ChildProcess], pipe: tuple[int, int]
) -> None:
    child = start()
    os.read(pipe[0], 100)
    pid = child.pid
    child.kill(0)
    del child
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_child_is_killed_though_no_thread_can_be_started(
    start: Callable[..., ChildProcess], pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of the interpreter, which starts no more threads."""

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    child = start()
    os.read(pipe[0], 100)
    monkeypatch.setattr(ChildProcess, "is_running", True)
    monkeypatch.setattr(threading.Thread, "start", refused)
    child.kill(0)
    monkeypatch.undo()
    child.wait(30)
    assert child.exit_text == "was killed by signal 9"
