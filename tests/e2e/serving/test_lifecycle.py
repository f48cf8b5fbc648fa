"""Launches that cannot serve exit with a one-line error; servers shut down in order on every signal."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.models.tiny_models import make_adapter
from fixtures.processes.resources import children
from fixtures.serving.running import RunningServer

from engine.processes.run_directory import run_directory

pytestmark = pytest.mark.e2e


def _launch(*flags: object) -> tuple[int, str]:
    """Launches a server that is expected to exit by itself; returns its status and the last line of stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "engine.launch", "--port", "0", *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.strip().splitlines()[-1]


def _gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def _wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signal_stops_all_processes_in_order(number: signal.Signals, tiny_model: Callable[[str], Path]) -> None:
    with RunningServer("--model-path", tiny_model("llama3")) as server:
        pids = server.children()
        run_directory = Path(server.connect_address.removeprefix("ipc://")).parent
        assert len(pids) == 3
        assert run_directory.stat().st_mode & 0o777 == 0o700
        os.killpg(server.process.pid, number)  # the signal reaches all processes at once, as from a terminal
        assert server.process.wait(timeout=30) == 0, server.log()
    assert _gone(pids)
    assert not run_directory.exists()
    assert "Traceback" not in server.log()


def _open_stream(server: RunningServer) -> http.client.HTTPResponse:
    """Opens a long stream and waits for its first event."""
    body = {"prompt": "on and on", "max_tokens": 450, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.connection = connection  # type: ignore[attr-defined]
    assert response.readline().startswith(b"data: ")
    return response


def test_signal_lets_open_streams_finish(tiny_model: Callable[[str], Path]) -> None:
    with RunningServer("--model-path", tiny_model("llama3")) as server:
        response = _open_stream(server)
        server.process.send_signal(signal.SIGTERM)
        host, port = server.url.removeprefix("http://").split(":")
        _wait_until(lambda: not _connects(host, int(port)), "new connections are accepted while stopping")
        assert b"data: [DONE]" in response.read()
        response.connection.close()  # type: ignore[attr-defined]
        assert server.process.wait(timeout=30) == 0


def _connects(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def test_second_signal_kills_at_once(tiny_model: Callable[[str], Path]) -> None:
    with RunningServer("--model-path", tiny_model("llama3"), expect_status=None) as server:
        pids = server.children()
        os.kill(pids[1], signal.SIGSTOP)  # no request can finish while the scheduler is stopped
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        server.process.wait(timeout=5)
        assert _gone(pids)


def test_children_exit_when_the_launcher_is_killed(tiny_model: Callable[[str], Path]) -> None:
    with RunningServer("--model-path", tiny_model("llama3"), expect_status=None) as server:
        pids = [pid for child in server.children() for pid in (child, *children(child))]
        os.kill(pids[-1], signal.SIGSTOP)  # one that cannot notice it by itself
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        _wait_until(lambda: _gone(pids), "children outlived their launcher")
    directory = Path(server.connect_address.removeprefix("ipc://")).parent
    with run_directory([directory.parent]):
        assert not directory.exists(), "the next launch sweeps it"


def test_unrecoverable_process_ends_the_launch(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model("llama3"), tmp_path / "m")
    with RunningServer("--model-path", model, expect_status=1) as server:
        pids = server.children()
        (model / "model.safetensors").unlink()
        os.kill(pids[0], signal.SIGKILL)
        assert server.process.wait(timeout=60) == 1
        _wait_until(lambda: _gone(pids), "children outlived their launcher")
        last = server.log().splitlines()[-1]
        assert last.startswith("chorus: the model_runner process ")
        assert last.endswith("too often in a row; its log is above")


def test_port_in_use_is_a_one_line_error(tiny_model: Callable[[str], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, line = _launch("--model-path", tiny_model("llama3"), "--port", port)
    assert status == 2
    assert line == f"chorus: --host 127.0.0.1 --port {port}: cannot listen there (Address already in use)"


def test_unservable_model_is_a_one_line_error(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    status, line = _launch("--model-path", tmp_path / "nowhere")
    assert status == 2
    assert "neither a directory nor a hub id" in line

    quantized = shutil.copytree(tiny_model("llama3"), tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    status, line = _launch("--model-path", quantized)
    assert status == 2
    assert "quantization_config" in line

    strange = shutil.copytree(tiny_model("llama3"), tmp_path / "strange")
    (strange / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    status, line = _launch("--model-path", strange)
    assert status == 2
    assert "MambaForCausalLM" in line


def test_broken_adapter_ends_the_launch_naming_it(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("llama3")
    adapter = make_adapter(model, tmp_path / "cut", r=4, targets=["q_proj"])
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    status, line = _launch("--model-path", model, "--lora-paths", f"fancy={adapter}")
    assert status != 0
    assert "fancy" in line
    assert "adapter_model.safetensors" in line


def test_limits_of_flags_are_enforced(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("llama3")
    adapter = make_adapter(model, tmp_path / "a", r=16, targets=["q_proj"])
    status, line = _launch("--model-path", model, "--lora-paths", f"a={adapter}", "--max-lora-rank", 8)
    assert status != 0
    assert "--max-lora-rank" in line
    status, line = _launch("--model-path", model, "--lora-paths", f"a={adapter}", "--lora-target-modules", "v_proj")
    assert status != 0
    assert "--lora-target-modules" in line
    status, line = _launch("--model-path", model, "--context-length", 100000)
    assert status == 2
    assert "--context-length" in line


def test_hostile_packages_in_the_cwd_are_not_imported(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama3")
    for name in ("scheduler", "model_runner", "tokenizer_proc", "torch", "zmq", "msgspec"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('hostile')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with RunningServer("--model-path", model) as server:
        assert server.post("/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 2}})[0] == 200
