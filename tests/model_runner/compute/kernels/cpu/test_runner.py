"""A runner and its builder: serving does not wait for the compiler, and the builder ends with the runner."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fixtures.processes.watched import WAIT_SECONDS, runs, wait_for

from engine.config.process_configs import Endpoints, RunnerConfig
from engine.errors import ConfigError
from engine.processes.child import STOP, Failed, Heartbeat, Ready
from model_runner.runner import Runner


def config(model: Path, tmp_path: Path, **fields: Any) -> RunnerConfig:
    endpoints = Endpoints(
        tokenizer="", scheduler=f"ipc://{tmp_path}/s.0", runner=f"ipc://{tmp_path}/r.0", zmq_server=""
    )
    return RunnerConfig(endpoints=endpoints, model_path=str(model), device="cpu", max_running_requests=4, **fields)


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
    while isinstance(
        word := msgspec.json.decode(process.stdout.readline(), type=Ready | Failed | Heartbeat), Heartbeat
    ):
        pass
    return word


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_runner_serves_while_a_compiler_hangs_and_ends_it(
    tiny_model: Callable[[str], Path], tmp_path: Path, hanging_compiler: Path, end: str
) -> None:
    background = config(tiny_model("llama3"), tmp_path, dtype="bfloat16", cpu_kernels="auto")
    with runner_process(background, XDG_CACHE_HOME=str(tmp_path)) as process:
        assert isinstance(report(process), Ready)
        wait_for(hanging_compiler.exists)
        compiler = int(hanging_compiler.read_text())
        assert runs(compiler)
        if end == "stop":
            assert process.stdin is not None
            process.stdin.write(STOP)
            process.stdin.flush()
        else:
            process.kill()
        wait_for(lambda: not runs(compiler))
        assert process.wait(WAIT_SECONDS) == (0 if end == "stop" else -signal.SIGKILL)
    cache = tmp_path / "chorus" / "compiled"
    wait_for(lambda: {path.name for path in cache.iterdir()} == {"lock"})


def test_runner_with_cpu_kernels_on_needs_a_compiler(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="--cpu-kernels on: no C"):
        Runner.load(config(tiny_model("llama3"), tmp_path, dtype="float32", cpu_kernels="on"))


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_float32_runner_compiles_nothing_unless_asked(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runner = Runner.load(config(tiny_model("llama3"), tmp_path, dtype="float32", cpu_kernels=mode))
    assert runner.poll_seconds is None
    runner.close()
    assert not (tmp_path / "chorus").exists()
