"""The builder as a real process: whoever started it may die at any time, and nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model_runner.compiled.__main__ import NICENESS
from model_runner.compiled.builder import Builder
from model_runner.compiled.cache import Cache
from model_runner.compiled.messages import Job, Order
from model_runner.compiled.program import Function

NORM = Function("add_norm", (48,), "bfloat16", (1e-5,))
PATIENCE = 120.0

PARENT = """
import sys, time
from pathlib import Path
from model_runner.compiled.builder import Builder
from model_runner.compiled.messages import Job, Order
from model_runner.compiled.program import Function
builder = Builder(Order([Job(Function("add_norm", (48,), "bfloat16", (1e-5,)), sys.argv[1])], 1))
print(builder.pid, flush=True)
time.sleep(1000)
"""


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether the process is there, and not merely its remains."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a compiler that never ends, and is the only one, writes its process id."""
    told = tmp_path / "told"
    script = tmp_path / "c++"
    script.write_text(f"#!/bin/sh\necho $$ > {told}.new && mv {told}.new {told}\nexec sleep 1000\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    return told


def test_a_killed_parent_takes_builder_and_compiler_along(hanging: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "compiled")
    command = [sys.executable, "-c", PARENT, str(cache.path(NORM, 1))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        builder = int(parent.stdout.readline())
        try:
            wait_for(hanging.exists)
            compiler = int(hanging.read_text())
            assert runs(builder)
            assert runs(compiler)
            assert os.getpriority(os.PRIO_PROCESS, compiler) - os.getpriority(os.PRIO_PROCESS, 0) == NICENESS
            assert list(cache.root.glob("build-*"))
        finally:
            parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not runs(builder))
    wait_for(lambda: not runs(compiler))
    assert not list(cache.root.glob("build-*"))


def test_one_that_is_ended_leaves_nothing(hanging: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "compiled")
    builder = Builder(Order([Job(NORM, str(cache.path(NORM, 1)))], 1))
    wait_for(hanging.exists)
    assert builder.hear() is None
    builder.end()
    assert not runs(builder.pid)
    wait_for(lambda: not runs(int(hanging.read_text())))
    assert not list(cache.root.glob("build-*"))
