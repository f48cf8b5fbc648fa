"""A request that crashes the runner repeatedly gets an error; concurrent streams only pause."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fixtures.models.tiny_models import VOCAB, make_adapter
from fixtures.serving.generate_streams import make_requests, read_all_tokens
from fixtures.serving.running import RunningServer

pytestmark = pytest.mark.e2e

HERE = Path(__file__).parents[2] / "fixtures" / "processes" / "poisoned_runner"
POISON = [9, 8, 5, 5, 5, 5, 7]


async def _poisoned(url: str, stream: bool) -> tuple[int, str]:
    """Returns status and body of a completion that crashes the runner."""
    body: dict[str, Any] = {"prompt": POISON, "model": "v1", "max_tokens": 8, "stream": stream}
    async with aiohttp.ClientSession(url) as session, session.post("/v1/completions", json=body) as response:
        return response.status, await response.text()


@pytest.mark.parametrize(
    ("does", "deaths"), [("abort", 2), ("raise", 2), pytest.param("kill", 5, marks=pytest.mark.slow)]
)
def test_poison_request_fails_alone(
    does: str,
    deaths: int,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama3")
    paths = {f"v{n}": make_adapter(model, tmp_path / f"v{n}", r=4 * (n + 1), seed=n) for n in range(4)}
    monkeypatch.setenv("POISON_DOES", does)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
    everything = make_requests(16, list(paths), 80, VOCAB)
    flags = ["--model-path", model, "--dtype", "float32", "--max-loras-per-batch", 4]
    with RunningServer(*flags, "--lora-paths", *(f"{name}={path}" for name, path in paths.items())) as server:
        undisturbed = asyncio.run(read_all_tokens(server.url, everything, at_once=4))

        async def run_all() -> tuple[int, str]:
            streams = asyncio.ensure_future(read_all_tokens(server.url, everything, at_once=16))
            await asyncio.sleep(0.05)
            ending = await _poisoned(server.url, stream=does == "raise")
            assert await streams == undisturbed
            return ending

        status, text = asyncio.run(run_all())
        assert status == (200 if does == "raise" else 500), text
        assert '"code":"poison_request"' in text.replace(" ", "")
        assert '"type":"server_error"' in text.replace(" ", "")
        assert server.log().count("model_runner process serves again") == deaths
        assert asyncio.run(read_all_tokens(server.url, everything[:4], at_once=4)) == undisturbed[:4]
        server.wait_idle()
