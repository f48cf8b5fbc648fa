"""The soak script finds no difference in two minutes of mixed traffic, and reports a wrong output."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import soak
from aiohttp import web
from aiohttp.test_utils import TestServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.e2e
@pytest.mark.slow
def test_two_minutes_have_no_difference() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "scripts/soak.py", "--minutes", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "SIGKILL" in done.stdout
    assert "slow readers" in done.stdout


@pytest.mark.parametrize(
    ("answer", "status", "differences"),
    [([5, 6, 7], 200, 0), ([5, 6, 8], 200, 1), ([5, 6], 200, 1), ([], 503, 0), ([], 500, 1), ([], 404, 1)],
)
def test_wrong_tokens_and_statuses_are_differences(answer: list[int], status: int, differences: int) -> None:
    async def generate(request: web.Request) -> web.Response:
        return web.json_response({"output_ids": answer}, status=status)

    async def main() -> soak.Soak:
        app = web.Application()
        app.router.add_post("/generate", generate)
        async with TestServer(app) as server:
            launched: Any = SimpleNamespace(url=str(server.make_url("")).rstrip("/"))
            request = soak.SoakRequest((1, 2), None, 3, None, stream=False)
            run = soak.Soak(cast(Any, launched), [request], 1, 1.0, 1, False, undisturbed={(0, "None"): [5, 6, 7]})
            async with run.session() as session:
                await run.one(session, random.Random(1))
            return run

    assert len(asyncio.run(main()).differences) == differences


def test_same_seed_makes_the_same_requests() -> None:
    assert soak.make_requests(20, random.Random(3)) == soak.make_requests(20, random.Random(3))
    assert soak.make_requests(20, random.Random(3)) != soak.make_requests(20, random.Random(4))
