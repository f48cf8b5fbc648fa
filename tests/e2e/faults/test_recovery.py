"""Any process may be killed or stopped under load: every stream ends with the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
from fixtures.models.tiny_models import VOCAB, make_adapter
from fixtures.serving.generate_streams import make_requests, read_all_tokens
from fixtures.serving.running import RunningServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ADAPTERS, STREAMS, TOKENS = 8, 64, 120


@pytest.fixture(scope="module")
def paths(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, model = tmp_path_factory.mktemp("voices"), tiny_model("llama3")
    return {f"v{n}": make_adapter(model, root / f"v{n}", r=4 * (n + 1), seed=n) for n in range(ADAPTERS)}


def _flags(model: Path, paths: dict[str, Path]) -> list[object]:
    flags: list[object] = ["--model-path", model, "--dtype", "float32", "--max-loras-per-batch", 4]
    return [*flags, "--lora-paths", *(f"{name}={path}" for name, path in paths.items())]


def _pid(server: RunningServer, module: str) -> int:
    """Returns the id of the process that runs `module`; waits for the next process while none runs it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for pid in server.children():
            with contextlib.suppress(OSError):
                if f"\0{module}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        time.sleep(0.02)
    raise AssertionError(f"no {module}\n{server.log()}")


async def _wait_recovered(server: RunningServer, times: int) -> None:
    while server.log().count("serves again") < times:
        await asyncio.sleep(0.1)


async def _send_signal(server: RunningServer, module: str, number: signal.Signals, recovered: int, wait: float) -> None:
    """Sends a signal `wait` seconds after the engine has recovered from the `recovered` earlier signals."""
    await _wait_recovered(server, recovered)
    steps = await asyncio.to_thread(_steps, server)
    while await asyncio.to_thread(_steps, server) == steps:
        await asyncio.sleep(0.1)
    await asyncio.sleep(wait)
    os.kill(_pid(server, module), number)


def _steps(server: RunningServer) -> int:
    return int(server.get("/server_info")["stats"]["steps"])


@contextlib.asynccontextmanager
async def _load_and_unload(url: str, path: Path) -> AsyncIterator[None]:
    """Loads and unloads one adapter repeatedly while the context is entered."""

    async def work() -> None:
        async with aiohttp.ClientSession(url) as session:
            while True:
                for call, body in (("load", {"lora_path": str(path)}), ("unload", {})):
                    async with session.post(f"/{call}_lora_adapter", json={"lora_name": "guest", **body}) as response:
                        assert response.status == 200, await response.text()

    task = asyncio.ensure_future(work())
    try:
        yield
        assert not task.done(), task.result()
    finally:
        task.cancel()


@pytest.mark.parametrize(
    ("module", "number", "times"),
    [("model_runner", signal.SIGKILL, 3), ("scheduler", signal.SIGKILL, 3), ("model_runner", signal.SIGSTOP, 2)],
)
def test_streams_survive_killed_or_stopped_processes(
    module: str, number: signal.Signals, times: int, tiny_model: Callable[[str], Path], paths: dict[str, Path]
) -> None:
    everything = make_requests(STREAMS, [None, *paths], TOKENS, VOCAB)
    with RunningServer(*_flags(tiny_model("llama3"), paths)) as server:
        undisturbed = asyncio.run(read_all_tokens(server.url, everything, at_once=16))

        async def send_signals() -> None:
            draw = random.Random(5)
            for recovered in range(times):
                await _send_signal(server, module, number, recovered, draw.random())
            await _wait_recovered(server, times)

        async def run_streams() -> None:
            signals = asyncio.ensure_future(send_signals())
            async with _load_and_unload(server.url, paths["v0"]):
                while not signals.done():
                    assert await read_all_tokens(server.url, everything, at_once=STREAMS) == undisturbed
            await signals

        asyncio.run(run_streams())
        server.wait_idle()
        assert server.log().count("serves again") == times
        assert "Traceback" not in server.log()


def test_restarted_tokenizer_process_serves_loaded_adapters(
    tiny_model: Callable[[str], Path], paths: dict[str, Path]
) -> None:
    (first, second, third), model = list(paths.items())[:3], tiny_model("llama3")
    with RunningServer(*_flags(model, dict([first, second]))) as server:
        load = {"lora_name": "late", "lora_path": str(third[1])}
        assert server.post("/load_lora_adapter", load)[0] == 200
        assert server.post("/unload_lora_adapter", {"lora_name": second[0]})[0] == 200
        everything = make_requests(12, [None, first[0], "late"], 24, VOCAB)
        undisturbed = asyncio.run(read_all_tokens(server.url, everything, at_once=4))
        held = [request for request in make_requests(32, [first[0], "late"], 440, VOCAB) if len(request.prompt) < 40]

        async def run_streams() -> None:
            streams = asyncio.ensure_future(read_all_tokens(server.url, held, at_once=32))
            await asyncio.sleep(0.3)
            assert not streams.done()
            os.kill(_pid(server, "tokenizer_proc"), signal.SIGKILL)
            with pytest.raises(aiohttp.ClientError):
                await streams

        asyncio.run(run_streams())
        assert asyncio.run(read_all_tokens(server.url, everything, at_once=4)) == undisturbed
        models = {card["id"] for card in server.get("/v1/models")["data"]}
        assert models == {str(model), first[0], "late"}
        assert server.post("/load_lora_adapter", {"lora_name": "new", "lora_path": str(second[1])})[0] == 200
        server.wait_idle()  # the rows of the lost streams are freed
