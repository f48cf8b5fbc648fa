"""Two steps in flight give the same output as one, in real processes, with stops, disconnects and preemptions."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fixtures.models.tiny_models import VOCAB, make_adapter
from fixtures.serving.running import RunningServer

pytestmark = pytest.mark.e2e

LORA = [None, "a", "b", "c", {"a": 0.5, "c": 0.25}]
VARIANTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "top_p": 0.95},
    {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.6},
    {"temperature": 1.1, "top_k": 30, "repetition_penalty": 1.1, "min_new_tokens": 30, "ignore_eos": False},
    {"temperature": 0.8, "stop": ["e", "th"], "min_new_tokens": 12},
    {"temperature": 0.8, "stop": ["a", " "]},
    {"temperature": 0, "max_new_tokens": 1},
    {"temperature": 1.0, "min_p": 0.02, "stop_token_ids": list(range(40, 80))},
]


def _bodies() -> list[dict[str, Any]]:
    """Returns all variants for all adapters; every third request has logprobs, those of its prompt included."""
    draw, made = random.Random(4), []
    for number in range(len(VARIANTS) * len(LORA)):
        params = {
            "max_new_tokens": 150,
            "ignore_eos": True,
            "sampling_seed": number,
            **VARIANTS[number % len(VARIANTS)],
        }
        body: dict[str, Any] = {
            "input_ids": [draw.randrange(6, VOCAB) for _ in range(draw.randint(1, 90))],
            "lora_path": LORA[number % len(LORA)],
            "sampling_params": params,
        }
        if number % 3 == 0:
            body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
        made.append(body)
    return made


async def _answers(url: str) -> list[dict[str, Any]]:
    """Sends all requests at once, while other clients disconnect early; returns the responses to the requests."""
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(body: dict[str, Any]) -> dict[str, Any]:
            async with session.post("/generate", json=body) as response:
                answer: dict[str, Any] = await response.json()
                assert response.status == 200, answer
            return answer

        async def leave(body: dict[str, Any], after: int) -> None:
            async with session.post("/generate", json={**body, "stream": True}) as response:
                async for line in response.content:
                    after -= line.startswith(b"data: ")
                    if after < 0:
                        response.close()
                        return

        bodies = _bodies()
        leaving = [leave(body, after) for after, body in enumerate(bodies[::5])]
        answers, _ = await asyncio.gather(asyncio.gather(*map(ask, bodies)), asyncio.gather(*leaving))
    return answers


def _logprobs(answer: dict[str, Any]) -> list[tuple[int, float]]:
    meta = answer["meta_info"]
    positions = [*meta.get("input_token_logprobs", []), *meta.get("output_token_logprobs", [])]
    return [(token, value or 0.0) for value, token, *_ in positions]


def test_two_steps_in_flight_answer_as_one(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("llama3")
    paths = [
        f"{name}={make_adapter(model, tmp_path / name, seed=i, r=r)}"
        for i, (name, r) in enumerate(zip("abc", (4, 8, 20), strict=True))
    ]
    flags = ["--model-path", model, "--dtype", "float32", "--lora-paths", *paths, "--max-loras-per-batch", 3]
    flags += ["--max-num-batched-tokens", 48, "--max-running-requests", 32, "--max-total-tokens", 560]
    found, preemptions = [], []
    for more in ([], ["--disable-overlap-schedule"]):
        with RunningServer(*flags, *more) as server:
            found.append(asyncio.run(_answers(server.url)))
            preemptions.append(server.wait_idle()["preemptions"])
        assert "Traceback" not in server.log()
    two, one = found
    assert min(preemptions) > 0, "too much memory for this test"
    for body, ours, theirs in zip(_bodies(), two, one, strict=True):
        assert (ours["text"], ours["output_ids"]) == (theirs["text"], theirs["output_ids"]), body
        for name in ("finish_reason", "prompt_tokens", "completion_tokens"):
            assert ours["meta_info"][name] == theirs["meta_info"][name], body
        ours_scores, their_scores = _logprobs(ours), _logprobs(theirs)
        assert [token for token, _ in ours_scores] == [token for token, _ in their_scores]
        assert [v for _, v in ours_scores] == pytest.approx([v for _, v in their_scores], abs=1e-3)
    ends = {answer["meta_info"]["finish_reason"]["type"] for answer in two}
    assert ends == {"stop", "length"}
