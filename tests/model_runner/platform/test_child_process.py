"""A child that was started: what it is told, how it ends, and how that is put."""

from __future__ import annotations

import os
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
if config["deaf"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
compiler = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL) if config["busy"] else None
os.write(config["pipe"], f"{compiler.pid if compiler else 0} {os.environ['OMP_NUM_THREADS']}".encode())
sys.exit(3 + len(sys.stdin.read()))
"""


class Config(msgspec.Struct):
    pipe: int
    deaf: bool = False
    busy: bool = False


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]) -> Callable[..., ChildProcess]:
    """Starts a CHILD."""
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def started(*, leads: bool = False, deaf: bool = False, busy: bool = False) -> ChildProcess:
        return ChildProcess("a_child", Config(pipe[1], deaf, busy), pipe[1], leads=leads)

    return started


def test_it_is_told_once_and_ends_with_its_lifeline(
    start: Callable[..., ChildProcess], pipe: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    child = start()
    assert os.read(pipe[0], 100) == b"0 1"
    assert child.runs
    assert child.ending == "does not end"
    child._lifeline.close()
    child.wait()
    assert child.ending == "ended with status 3"
    child.kill(0)
    assert child.ending == "ended with status 3"
    assert capfd.readouterr().out == ""


def test_one_that_leads_takes_along_what_it_started(start: Callable[..., ChildProcess], pipe: tuple[int, int]) -> None:
    child = start(leads=True, busy=True)
    started = int(os.read(pipe[0], 100).split()[0])
    assert runs(started)
    child.kill(10)
    assert not child.runs
    assert child.ending == "was killed by signal 9"
    wait_for(lambda: not runs(started))


def test_one_that_does_not_lead_is_killed_alone(start: Callable[..., ChildProcess], pipe: tuple[int, int]) -> None:
    child = start()
    os.read(pipe[0], 100)
    assert os.getpgid(child.pid) == os.getpgid(0)
    child.kill(10)
    assert child.ending == "was killed by signal 9"


@pytest.mark.parametrize(("deaf", "signal"), [(False, 15), (True, 9)])
def test_one_that_is_asked_may_refuse(
    start: Callable[..., ChildProcess], pipe: tuple[int, int], deaf: bool, signal: int
) -> None:
    child = start(deaf=deaf)
    os.read(pipe[0], 100)
    child.ask_to_end()
    child.wait(0.2 if deaf else 30)
    assert child.runs == deaf
    child.kill(10)
    assert child.ending == f"was killed by signal {signal}"
