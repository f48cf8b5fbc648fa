"""The other tenant: sixteen streams in a loop, whose tokens are compared and whose gaps between tokens are measured."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

STREAMS, REQUESTS, TOKENS = 16, 48, 64
ADAPTERS = ("pirate", "json", "poet", "french")
LONG_PROMPT = 1900
LIMIT_SECONDS = 120.0

Selection = str | dict[str, float] | None


@dataclass(frozen=True)
class Request:
    """A request with a fixed prompt, greedy or with a seed."""

    prompt: tuple[int, ...]
    lora: Selection
    seed: int | None

    def body(self, rid: str) -> dict[str, Any]:
        """Returns the body for /generate."""
        params: dict[str, Any] = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        if self.seed is not None:
            params |= {"temperature": 1.0, "seed": self.seed, "top_p": 0.9, "frequency_penalty": 0.3}
        return {
            "input_ids": [*self.prompt], "lora_path": self.lora, "sampling_params": params, "stream": True, "rid": rid
        }  # fmt: skip


def make_requests(draw: random.Random) -> list[Request]:
    """Returns requests for the base, every adapter and a mix, with prompts of 8 to 200 tokens; a quarter is seeded."""
    loras: list[Selection] = [None, *ADAPTERS, {"pirate": 0.5, "french": 0.5}]
    requests = []
    for number in range(REQUESTS):
        prompt = tuple(draw.randrange(8, 1500) for _ in range(draw.randrange(8, 200)))
        requests.append(Request(prompt, loras[number % len(loras)], number if number % 4 == 3 else None))
    return requests


@dataclass
class Watch:
    """What the streams of one phase saw. `gaps` are (time of the end, seconds) of gaps between tokens of a stream."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    answered: int = 0
    refused: int = 0
    cut: int = 0
    differences: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Returns the gap in seconds below which this share of the gaps lies; 0 without gaps."""
        return percentile([gap for _, gap in self.gaps], share)

    def first_token(self) -> float:
        """Returns p99 of the seconds to the first token."""
        return percentile(self.first, 0.99)

    def worst(self) -> float:
        """Returns the longest gap in seconds."""
        return max((gap for _, gap in self.gaps), default=0.0)


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value below which this share of the values lies, or 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Lost(Exception):
    """A stream ended without its end."""


class Victim:
    """The tenant. `may_lose` allows its streams to be cut, as those of a killed tokenizer process are."""

    def __init__(self, url: str, key: str, requests: list[Request]) -> None:
        self._url, self._key, self._requests = url, key, requests
        self._expected: dict[int, list[int]] = {}
        self.may_lose = False

    async def learn(self, touch_tokens: int = 0) -> None:
        """Makes each request once, undisturbed: these tokens are the right ones from then on.

        Before that, prompts of `touch_tokens` together use each page of a KV cache of that size: the system gives
        memory to a page when it is first used, and that is no leak of the attack's.
        """
        draw, head = random.Random(0), {"Authorization": f"Bearer {self._key}"}
        async with aiohttp.ClientSession(self._url, headers=head) as session:
            for _ in range(touch_tokens // LONG_PROMPT):
                prompt = [draw.randrange(8, 1500) for _ in range(LONG_PROMPT)]
                body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}}
                async with session.post("/generate", json=body) as response:
                    response.raise_for_status()
        watch = Watch()
        await self.run(time.monotonic(), watch)
        if watch.differences:
            raise RuntimeError(f"the undisturbed streams already differ: {watch.differences[:3]}")

    async def run(self, until: float, watch: Watch) -> None:
        """Keeps STREAMS streams open until a time of `time.monotonic`, and enters what they see."""
        connector = aiohttp.TCPConnector(limit=0)
        head = {"Authorization": f"Bearer {self._key}"}
        timeout = aiohttp.ClientTimeout(total=LIMIT_SECONDS)
        async with aiohttp.ClientSession(self._url, headers=head, timeout=timeout, connector=connector) as session:
            await asyncio.gather(*(self._stream(session, number, until, watch) for number in range(STREAMS)))

    async def _stream(self, session: aiohttp.ClientSession, number: int, until: float, watch: Watch) -> None:
        for turn in self._turns(number, until):
            which = (number + turn * STREAMS) % len(self._requests)
            rid = f"victim-{number}-{turn}"
            tokens: list[int] = []
            try:
                status = await self._read(session, self._requests[which], rid, tokens, watch)
            except (aiohttp.ClientError, OSError, Lost, TimeoutError) as error:
                watch.cut += 1
                status = 0
                if not self.may_lose or isinstance(error, TimeoutError):
                    watch.differences.append(f"{type(error).__name__}: {error}")
            self._compare(which, tokens, status, watch)
            if status != 200:
                await asyncio.sleep(0.5)

    def _turns(self, number: int, until: float) -> Iterator[int]:
        """Yields turns until the time is over, at least so many that every request was made once."""
        turn = 0
        least = -(-len(self._requests) // STREAMS)
        while time.monotonic() < until or (turn < least and len(self._expected) < len(self._requests)):
            yield turn
            turn += 1

    async def _read(
        self, session: aiohttp.ClientSession, request: Request, rid: str, tokens: list[int], watch: Watch
    ) -> int:
        """Reads one stream into `tokens` and returns its status."""
        began = last = time.monotonic()
        async with session.post("/generate", json=request.body(rid)) as response:
            if response.status != 200:
                watch.refused += 1
                if response.status != 503 or not self.may_lose:
                    watch.differences.append(f"{response.status}: {(await response.text())[:200]}")
                return response.status
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    return 200
                if not line.startswith(b"data: {"):
                    continue
                event = msgspec.json.decode(line[6:])
                if "error" in event:
                    raise Lost(str(event["error"])[:200])
                now = time.monotonic()
                if len(event["output_ids"]) > len(tokens):
                    if tokens:
                        watch.gaps.append((now, now - last))
                    else:
                        watch.first.append(now - began)
                    last = now
                if event["output_ids"][: len(tokens)] != tokens:
                    watch.differences.append("a token that was sent has changed")
                tokens[:] = event["output_ids"]
        raise Lost("the stream ended without [DONE]")

    def _compare(self, which: int, tokens: list[int], status: int, watch: Watch) -> None:
        """Compares a stream with the calm one; the first whole stream of a request is the calm one."""
        if status == 200:
            watch.answered += 1
            if which not in self._expected and len(tokens) == TOKENS:
                self._expected[which] = list(tokens)
        expected = self._expected.get(which, tokens)
        whole = len(tokens) == TOKENS or status != 200
        if not whole or tokens != expected[: len(tokens)]:
            same = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, expected, strict=False))
            )
            watch.differences.append(f"{len(tokens)} tokens of {TOKENS}, of which {same} are those of the calm")


async def poll_health(url: str, until: float, worst: list[float]) -> None:
    """Asks for /health twice a second; appends the seconds of each answer, LIMIT_SECONDS where there was none."""
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(force_close=True)) as session:
        while time.monotonic() < until:
            began = time.monotonic()
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(LIMIT_SECONDS), session.get("/health") as response:
                    await response.read()
            worst.append(time.monotonic() - began)
            await asyncio.sleep(0.5)
