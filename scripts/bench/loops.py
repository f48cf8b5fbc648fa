"""When requests go out: the closed loop (a fixed number in flight) and the open loop (at their due times).

Works with any `Sender` and evaluates nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from bench.client import Sample
from bench.workload import Request


class Sender(Protocol):
    """An object that sends requests; `due` is the `perf_counter` time at which the request was due."""

    async def send(self, request: Request, due: float) -> Sample: ...


@dataclass(frozen=True)
class Run:
    """All samples of one run over one workload, and its duration in seconds."""

    samples: list[Sample]
    seconds: float


async def closed_loop(server: Sender, requests: list[Request], concurrency: int, label: str) -> Run:
    """Runs `concurrency` clients. Each sends its next request when its last one has finished."""
    queue, samples = iter(requests), []
    start = time.perf_counter()
    with tqdm(total=len(requests), desc=label, unit="req", leave=False) as bar:

        async def client() -> None:
            for request in queue:  # all clients share one iterator: a free client takes the next request
                samples.append(await server.send(request, time.perf_counter()))
                bar.update()

        await asyncio.gather(*(client() for _ in range(min(concurrency, len(requests)))))
    return Run(samples, time.perf_counter() - start)


async def open_loop(server: Sender, requests: list[Request], limit: int | None, label: str) -> Run:
    """Sends every request at its due time, whether or not earlier requests have finished.

    `limit` bounds the requests in flight. Further requests wait here, and the wait counts: times run from the due time.
    """
    gate = asyncio.Semaphore(limit) if limit else contextlib.nullcontext()
    start = time.perf_counter()
    with tqdm(total=len(requests), desc=label, unit="req", leave=False) as bar:

        async def one(request: Request) -> Sample:
            await asyncio.sleep(start + request.due - time.perf_counter())
            async with gate:
                sample = await server.send(request, start + request.due)
            bar.update()
            return sample

        samples = await asyncio.gather(*(one(request) for request in requests))
    return Run(list(samples), time.perf_counter() - start)
