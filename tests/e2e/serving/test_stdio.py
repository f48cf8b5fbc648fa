"""The server starts and serves whatever its standard streams and its locale are, also after its runner was killed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fixtures.models.tiny_models import make_adapter
from fixtures.processes.resources import children
from fixtures.processes.watched import runs, wait_for

pytestmark = pytest.mark.e2e


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def _server(model: Path, redirections: str, *flags: str, **options: object) -> Iterator[tuple[str, int]]:
    """Runs a server with these redirections of a shell. Yields its URL and its process id."""
    port = _free_port()
    command = [sys.executable, "-m", "engine.launch", str(model), "--port", str(port), "--cpu-kernels", "off", *flags]
    shell = ["bash", "-c", f'exec "$@" {redirections}', "bash", *command]
    process = subprocess.Popen(shell, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: process.poll() is not None or _status(url + "/ready") == 200)
        assert process.poll() is None, f"it ended with status {process.returncode}"
        yield url, process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _status(url: str, body: dict[str, object] | None = None) -> int:
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except OSError:
        return 0


def _serves(url: str, model: str | None = None) -> bool:
    body: dict[str, object] = {"prompt": "hello", "max_tokens": 2} | ({"model": model} if model else {})
    return _status(url + "/v1/completions", body) == 200


def _runner_comes_back(url: str, launcher: int) -> None:
    (runner,) = [pid for pid in children(launcher) if b"\0model_runner\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(runner, signal.SIGKILL)
    wait_for(lambda: not runs(runner))
    assert _serves(url)


def test_closed_streams_are_no_obstacle(tiny_model: Callable[[str], Path]) -> None:
    with _server(tiny_model("llama3"), "<&- >&- 2>&-") as (url, launcher):
        assert _serves(url)
        for descriptor in range(3):
            assert os.readlink(f"/proc/{launcher}/fd/{descriptor}") == os.devnull
        _runner_comes_back(url, launcher)


def test_full_stdout_and_gone_stderr_reader_are_no_obstacle(tiny_model: Callable[[str], Path]) -> None:
    with _server(tiny_model("llama3"), ">/dev/full 2> >(exec true)") as (url, launcher):
        assert _serves(url)
        _runner_comes_back(url, launcher)


def test_stalled_log_collector_stops_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Both streams are a full pipe, in a locale without the letters of a name. Later the log flows again."""
    model = tiny_model("llama3")
    adapter = make_adapter(model, tmp_path / "a", r=4)
    read_end, write_end = os.pipe()
    os.write(write_end, bytes(fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": ""}
    flags = ["--log-level", "debug", "--lora-paths", f"zwölf={adapter}"]
    with _server(model, f">&{write_end} 2>&{write_end}", *flags, pass_fds=[write_end], env=environment) as (url, pid):
        assert all(_serves(url, "zwölf") for _ in range(3))
        _runner_comes_back(url, pid)
        log = b""
        while b"serves again" not in log or b"Chorus is ready at" not in log:
            log += os.read(read_end, 1 << 16)
        assert b"Traceback" not in log
    os.close(read_end)
    os.close(write_end)
