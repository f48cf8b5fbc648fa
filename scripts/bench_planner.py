"""Measures the time of a plan: 256 running rows in 64 lanes, 10,000 waiting requests, 1,000 adapters, on one core.

python scripts/bench_planner.py               the medians, and where the time of a decode step goes
python scripts/bench_planner.py --rows 64     with 64 running rows

decode     every row decodes, and no request can be admitted
turnover   a row ends before each step, so one is admitted, and its adapter is filled
late       requests have waited too long, so the deadlines are checked and lanes chosen for preemption
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

from engine.messages import (
    Abort,
    AdapterState,
    Capacity,
    Chunk,
    Footprint,
    Generate,
    LoadAdapter,
    Sampling,
    Step,
    StepDone,
    Stopping,
)
from scheduler.core import Scheduler
from scheduler.state import Bounds

BUDGET_US = 200.0


class Bench:
    """A loaded scheduler, whose runner completes every step at once."""

    def __init__(self, rows: int, waiting: int, adapters: int, lanes: int, pool: int) -> None:
        capacity = Capacity(
            kv_pages=400 * rows,
            page_size=16,
            rows=rows,
            max_length=1 << 20,
            max_batched_tokens=8192,
            vocab_size=1000,
            max_loras=lanes,
            rank_pages={"qkv": pool, "o": pool, "gate_up": pool, "down": pool},
            max_lane_pages=8,
        )
        self.adapters, self.now, self.sent = adapters, 0.0, 0
        self.running: dict[int, int] = {}  # running request of each row
        self.core = Scheduler(capacity, Bounds(lanes, lora_max_wait=1e6))
        self._load()
        for number in range(rows):
            self.ask(1 + number % lanes)
        while self.core.stats().running < rows:
            self.answer(self.plan())
        for number in range(waiting):
            self.ask(1 + (number * 7919) % adapters)
        for _ in range(20):
            self.answer(self.plan())

    def _load(self) -> None:
        footprint = Footprint(dict.fromkeys(("qkv", "o", "gate_up", "down"), 1))
        for number in range(1, self.adapters + 1):
            self.core.handle(LoadAdapter(adapter_id=number, path=f"a{number}"), self.now)
            card = AdapterState(
                adapter_id=number, state="host", revision=f"r{number}", footprint=footprint, bytes=20_000_000
            )
            self.core.handle(card, self.now)

    def ask(self, adapter: int) -> None:
        """Sends one more request for `adapter`; the request never ends."""
        self.sent += 1
        message = Generate(
            epoch=0,
            request_id=self.sent,
            prompt=[self.sent % 1000] * 32,
            lora=[(adapter, 1.0)],
            sampling=Sampling(seed=self.sent),
            stopping=Stopping(1 << 19),
        )
        self.core.handle(message, self.now)

    def plan(self) -> Step:
        """Plans and returns the next step, 10 ms after the last one."""
        self.now += 0.01
        step = self.core.plan(self.now)
        assert step is not None
        self.core.drain_outbox()
        return step

    def answer(self, step: Step) -> None:
        """Completes a step and its fills."""
        self.running |= {new.row: new.sampling.seed for new in step.new_rows}
        tokens = [1] * sum(chunk.samples for chunk in step.chunks)
        self.core.handle(StepDone(epoch=0, id=step.id, tokens=tokens, seconds=0.01), self.now)
        for fill in step.fills:
            self.core.handle(AdapterState(adapter_id=fill.adapter_id, state="resident", seconds=0.001), self.now)

    def times(self, count: int, before: Callable[[int], None]) -> list[float]:
        """Returns the microseconds of each of `count` plans; `before` is called before each plan."""
        found = []
        for number in range(count):
            before(number)
            began = time.perf_counter()
            step = self.plan()
            found.append((time.perf_counter() - began) * 1e6)
            self.answer(step)
        return found

    def end_one(self, _number: int) -> None:
        """Aborts a running request and sends a new one."""
        running = sorted(self.running.values())
        self.core.handle(Abort(0, running[len(running) // 2]), self.now)
        self.ask(1 + (self.sent * 7919) % self.adapters)

    def hurry(self, _number: int) -> None:
        """Advances the clock until all requests have waited too long."""
        self.now += 1e7


def breakdown(rows: int) -> dict[str, float]:
    """Returns the microseconds that any planner needs at least: the time to create one chunk per row."""
    floor = []
    for _ in range(200):
        began = time.perf_counter()
        for row in range(rows):
            Chunk(row=row, generation=1, start=100, length=1, lane=1)
        floor.append((time.perf_counter() - began) * 1e6)
    return {"chunks alone": statistics.median(floor)}


def main() -> None:
    """Measures the plans and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=256)
    add("--waiting", type=int, default=10_000)
    add("--adapters", type=int, default=1000)
    add("--lanes", type=int, default=64)
    add("--pool", type=int, default=256)
    add("--steps", type=int, default=500)
    args = parser.parse_args()
    bench = Bench(args.rows, args.waiting, args.adapters, args.lanes, args.pool)
    gc.collect()

    found = {
        "decode": bench.times(args.steps, lambda _: None),
        "turnover": bench.times(args.steps, bench.end_one),
        "late": bench.times(20, bench.hurry),
    }
    bench.core.check()
    print(f"{args.rows} rows in {args.lanes} lanes, {args.waiting} waiting over {args.adapters} adapters, us a plan")
    print("              median       p90       max")
    for name, times in found.items():
        times.sort()
        print(f"{name:12}{statistics.median(times):8.0f}{times[int(0.9 * len(times))]:10.0f}{times[-1]:10.0f}")
    for name, micros in breakdown(args.rows).items():
        print(f"{name:12}{micros:8.0f}")
    print(json.dumps({name: round(statistics.median(times), 1) for name, times in found.items()}))
    median = statistics.median(found["decode"])
    print(f"decode: {median:.0f} us of {BUDGET_US:.0f}: {'holds' if median < BUDGET_US else 'DOES NOT HOLD'}")


if __name__ == "__main__":
    main()
