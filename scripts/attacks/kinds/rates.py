"""Bursts against rates and limits: what is admitted stays under the rate, and Retry-After within its window."""

from __future__ import annotations

import random
import time

from attacks.kind import Broken, kind
from attacks.target import Target, all_of

TOKENS_PER_MINUTE = 600
REQUESTS_PER_MINUTE = 120
WINDOW = 60


class Ledger:
    """What a key with rates was given since the first call."""

    began: float | None = None
    tokens = 0
    requests = 0


async def ask(target: Target, path: str, body: dict[str, object]) -> None:
    """Makes one call with the key that has rates, and enters what came of it."""
    answer = await target.call(path, body, key="limited", expect=(200, 400, 429, 503))
    if answer.status == 429:
        wait = int(answer.headers.get("Retry-After", "-1"))
        if not 0 < wait <= WINDOW:
            raise Broken(f"Retry-After is {wait} for a window of {WINDOW} s")
    elif answer.status == 200:
        usage = answer.json()["usage"]
        Ledger.tokens += usage["prompt_tokens"] + usage["completion_tokens"]
        Ledger.requests += len(answer.json()["choices"])


@kind("rates.burst")
async def burst(target: Target, draw: random.Random) -> None:
    """A hundred calls at once, many answers of one call, or no length at all, at 600 tokens a minute."""
    Ledger.began = Ledger.began or time.monotonic()
    cases: list[tuple[str, dict[str, object], int]] = [
        ("/v1/completions", {"prompt": "a b c", "max_tokens": 100, "ignore_eos": True}, 100),
        ("/v1/completions", {"prompt": "a b c", "max_tokens": 1}, 100),
        ("/v1/completions", {"prompt": "a", "max_tokens": 16, "n": 128, "ignore_eos": True}, 4),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}, 8),
        ("/v1/completions", {"prompt": ["a"] * 100, "max_tokens": 20, "ignore_eos": True}, 3),
    ]
    path, body, count = draw.choice(cases)
    await all_of(*(ask(target, path, body) for _ in range(count)))
    passed = time.monotonic() - Ledger.began + 2 * WINDOW  # a full window at the start, one call beyond, and the time
    for what, got, rate in (
        ("tokens", Ledger.tokens, TOKENS_PER_MINUTE),
        ("requests", Ledger.requests, REQUESTS_PER_MINUTE),
    ):
        if got > rate * passed / WINDOW + 2:
            raise Broken(f"{got} {what} in {passed - 2 * WINDOW:.0f} s at {rate} a minute")


@kind("rates.floods", seconds=120)
async def floods(target: Target, draw: random.Random) -> None:
    """Three hundred short requests at once, or a few that ask for a thousand answers: 200, or refused at once."""
    if draw.random() < 0.7:
        body = {"input_ids": [9, 10, 11], "sampling_params": {"max_new_tokens": 2}}
        await all_of(*(target.call("/generate", body, expect=(200, 503), seconds=110) for _ in range(300)))
    else:
        body = {"prompt": "a", "n": 128, "max_tokens": 16, "ignore_eos": True}
        await all_of(*(target.leave("/v1/completions", body, draw.uniform(0.5, 5)) for _ in range(8)))


@kind("rates.long_streams")
async def long_streams(target: Target, draw: random.Random) -> None:
    """Twenty-four answers to the end of the context, whose clients leave after some seconds."""
    loras = [None, "pirate", "json", {"poet": 0.5, "french": 0.5}]

    def body() -> dict[str, object]:
        params = {"max_new_tokens": 1900, "ignore_eos": True}
        return {"input_ids": [9] * 40, "lora_path": draw.choice(loras), "sampling_params": params, "stream": True}

    await all_of(*(target.leave("/generate", body(), draw.uniform(1, 5)) for _ in range(24)))
