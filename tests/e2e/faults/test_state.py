"""State of a launch that cannot be written or is deleted: nothing that was answered is lost, and serving goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.models.tiny_models import make_adapter
from fixtures.processes.watched import wait_for
from fixtures.serving.running import RunningServer

from engine import Engine, SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NAMES = ("one", "two", "three")
PROCESSES = ("tokenizer_proc", "scheduler", "model_runner")


@pytest.fixture(scope="module")
def paths(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model, root = tiny_model("llama3"), tmp_path_factory.mktemp("adapters")
    return {name: str(make_adapter(model, root / name, r=8, seed=seed)) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def server(tiny_model: Callable[[str], Path], paths: dict[str, str]) -> Iterator[RunningServer]:
    flags = ["--model-path", tiny_model("llama3"), "--dtype", "float32", "--lora-paths", f"one={paths['one']}"]
    with RunningServer(*flags) as server:
        yield server


def _pid(server: RunningServer, module: str) -> int:
    """Returns the id of the process that runs `module`, 0 while none does."""
    for pid in server.children():
        with contextlib.suppress(OSError):
            if f"\0{module}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return 0


def _kill(server: RunningServer, *modules: str) -> None:
    """Kills the processes that run these modules, and waits until their successors serve."""
    serving = server.log().count("serves again")
    for module in modules:
        wait_for(lambda module=module: _pid(server, module))  # type: ignore[misc]
        os.kill(_pid(server, module), signal.SIGKILL)
    wait_for(lambda: server.log().count("serves again") >= serving + len(modules))


def _tokens(server: RunningServer, name: str) -> Any:
    body = {"input_ids": [5, 6, 7], "lora_path": name, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    status, answer = server.post("/generate", body)
    return answer["output_ids"] if status == 200 else (status, answer["error"]["message"])


def _load(server: RunningServer, name: str, path: str) -> tuple[int, str]:
    """Loads an adapter in place. Returns the status and the message of an error."""
    body = {"lora_name": name, "lora_path": path, "load_inplace": True}
    status, answer = server.post("/v1/load_lora_adapter", body)
    return status, answer["error"]["message"]


def _journal_size(pid: int) -> int:
    """Returns the size of the journal's file in use, as its process has it open."""
    files = Path(f"/proc/{pid}/fd").iterdir()
    return max(file.stat().st_size for file in files if "memfd:adapters" in os.readlink(file))


def test_a_change_that_cannot_be_recorded_is_a_503(server: RunningServer, paths: dict[str, str]) -> None:
    assert server.post("/load_lora_adapter", {"lora_name": "late", "lora_path": paths["two"], "pinned": True})[0] == 200
    before = {name: _tokens(server, name) for name in ("one", "late")}
    pid = _pid(server, "tokenizer_proc")
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (_journal_size(pid) + 10, hard))
    cards = server.get("/v1/models")
    for call, body in (
        ("/load_lora_adapter", {"lora_name": "new", "lora_path": paths["three"]}),
        ("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": paths["three"], "load_inplace": True}),
        ("/unload_lora_adapter", {"lora_name": "one"}),
        ("/unpin_lora_adapter", {"lora_name": "late"}),
    ):
        status, answer = server.post(call, body)
        assert (status, answer["error"]["type"]) == (503, "storage_error")
        assert "nothing was changed" in answer["error"]["message"]
    assert server.get("/v1/models") == cards
    assert {name: _tokens(server, name) for name in before} == before
    _kill(server, "tokenizer_proc")
    assert {name: _tokens(server, name) for name in before} == before
    assert _tokens(server, "new")[0] == 404
    assert {card["id"]: card["pinned"] for card in server.get("/v1/models")["data"][1:]} == {"one": False, "late": True}


def test_a_deleted_run_directory_ends_nothing(server: RunningServer, paths: dict[str, str]) -> None:
    assert server.post("/load_lora_adapter", {"lora_name": "kept", "lora_path": paths["two"]})[0] == 200
    before = {name: _tokens(server, name) for name in ("one", "kept")}
    directory = Path(server.connect_address.removeprefix("ipc://")).parent

    async def embedded() -> list[int]:
        async with Engine.connect(server.connect_address) as engine:
            params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
            (answer,) = await engine.generate_all([[5, 6, 7]], params, lora="kept")
            return list(answer.token_ids)

    for module in PROCESSES:
        shutil.rmtree(directory)
        _kill(server, module)
        assert {name: _tokens(server, name) for name in before} == before
    shutil.rmtree(directory)
    wait_for((directory / "clients.0").exists)
    assert len(asyncio.run(embedded())) == 8
    assert "Traceback" not in server.log()


def test_files_that_changed_are_not_served_by_a_successor(server: RunningServer, paths: dict[str, str]) -> None:
    assert server.post("/load_lora_adapter", {"lora_name": "other", "lora_path": paths["two"]})[0] == 200
    before, weights = _tokens(server, "one"), "adapter_model.safetensors"
    for name in ("one", "two"):
        shutil.copy(Path(paths["three"]) / weights, Path(paths[name]) / weights)
    _kill(server, "scheduler", "model_runner", "tokenizer_proc")
    for name in ("one", "other"):
        status, message = _tokens(server, name)
        assert status == 400
        assert "its files have changed" in message
        assert "load_inplace" in message
    assert server.post("/load_lora_adapter", {"lora_name": "one", "lora_path": paths["one"]})[0] == 200
    assert _tokens(server, "one") not in (before, None)
    assert server.post("/unload_lora_adapter", {"lora_name": "other"})[0] == 200


def test_a_runner_starts_again_without_the_first_adapters(server: RunningServer, paths: dict[str, str]) -> None:
    """Adapters of --lora-paths may be unloaded and deleted: they only size the pools, once."""
    rank = server.get("/server_info")["capacity"]["max_lora_rank"]
    assert server.post("/load_lora_adapter", {"lora_name": "last", "lora_path": paths["three"]})[0] == 200
    before = _tokens(server, "last")
    server.post("/unload_lora_adapter", {"lora_name": "one"})
    shutil.rmtree(paths["one"])
    _kill(server, "model_runner")
    assert _tokens(server, "last") == before
    assert server.get("/server_info")["capacity"]["max_lora_rank"] == rank
