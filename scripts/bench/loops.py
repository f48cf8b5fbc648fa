"""When requests go out: the closed loop (a fixed number in flight) and the open loop (at their due times).

Knows clocks and tasks; not what is sent or how it is judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from bench.client import Sample
from bench.workload import Ask


class Sender(Protocol):
    """Whatever can send an ask that was due at a `perf_counter` time."""

    async def send(self, ask: Ask, due: float) -> Sample: ...


@dataclass(frozen=True)
class Run:
    """All samples of one run over one workload, and how long it took in seconds."""

    samples: list[Sample]
    seconds: float


async def closed_loop(server: Sender, asks: list[Ask], concurrency: int, label: str) -> Run:
    """`concurrency` clients, each sending its next request when its last is answered."""
    queue, samples = iter(asks), []
    start = time.perf_counter()
    with tqdm(total=len(asks), desc=label, unit="req", leave=False) as bar:

        async def client() -> None:
            for ask in queue:  # one iterator for all: who is free takes the next
                samples.append(await server.send(ask, time.perf_counter()))
                bar.update()

        await asyncio.gather(*(client() for _ in range(min(concurrency, len(asks)))))
    return Run(samples, time.perf_counter() - start)


async def open_loop(server: Sender, asks: list[Ask], limit: int | None, label: str) -> Run:
    """Every request at its due time, answered or not the ones before.

    With a limit of requests in flight the others wait here, and their wait counts: times run from the due time.
    """
    gate = asyncio.Semaphore(limit) if limit else contextlib.nullcontext()
    start = time.perf_counter()
    with tqdm(total=len(asks), desc=label, unit="req", leave=False) as bar:

        async def one(ask: Ask) -> Sample:
            await asyncio.sleep(start + ask.due - time.perf_counter())
            async with gate:
                sample = await server.send(ask, start + ask.due)
            bar.update()
            return sample

        samples = await asyncio.gather(*(one(ask) for ask in asks))
    return Run(list(samples), time.perf_counter() - start)
