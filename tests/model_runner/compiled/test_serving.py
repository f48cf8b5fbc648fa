"""A runner and its builder: steps do not wait for compilers, and one ends with the other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.child import Failed, Ready
from engine.config import Links, RunnerConfig
from engine.errors import ConfigError
from model_runner.runner import Runner

PATIENCE = 120.0


def config(model: Path, tmp_path: Path, **fields: Any) -> RunnerConfig:
    links = Links(tokenizer="", scheduler=f"ipc://{tmp_path}/s.0", runner=f"ipc://{tmp_path}/r.0", door="")
    return RunnerConfig(links=links, model_path=str(model), device="cpu", max_running_requests=4, **fields)


@contextlib.contextmanager
def runner_process(config: RunnerConfig, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "model_runner"], stdin=pipe, stdout=pipe, stderr=pipe, env=env
    ) as process:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        process.stdin.flush()
        try:
            yield process
        finally:
            process.kill()


def report(process: subprocess.Popen[bytes]) -> Ready | Failed:
    assert process.stdout is not None
    return msgspec.json.decode(process.stdout.readline(), type=Ready | Failed)


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


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_it_serves_while_a_compiler_hangs_and_takes_it_along(
    tiny_model: Callable[[str], Path], tmp_path: Path, end: signal.Signals
) -> None:
    told, script = tmp_path / "told", tmp_path / "c++"
    script.write_text(f"#!/bin/sh\necho $$ > {told}.new && mv {told}.new {told}\nexec sleep 1000\n")
    script.chmod(0o700)
    beside = config(tiny_model("llama3"), tmp_path, dtype="bfloat16", torch_compile="auto")
    with runner_process(beside, CXX=str(script), XDG_CACHE_HOME=str(tmp_path)) as process:
        assert isinstance(report(process), Ready)
        wait_for(told.exists)
        compiler = int(told.read_text())
        assert runs(compiler)
        process.send_signal(end)
        wait_for(lambda: not runs(compiler))
        assert process.wait(PATIENCE) == (0 if end is signal.SIGTERM else -end)
    cache = tmp_path / "chorus" / "compiled"
    wait_for(lambda: {path.name for path in cache.iterdir()} == {"lock"})


def test_it_does_not_start_without_what_was_asked_for(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="--torch-compile on: no C"):
        Runner.load(config(tiny_model("llama3"), tmp_path, dtype="float32", torch_compile="on"))


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_in_float32_nothing_is_compiled_by_itself(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runner = Runner.load(config(tiny_model("llama3"), tmp_path, dtype="float32", torch_compile=mode))
    assert runner.wait is None
    runner.close()
    assert not (tmp_path / "chorus").exists()
