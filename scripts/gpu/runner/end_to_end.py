"""The whole runner on the 8B shape: step times by batch and adapters, and the cost of switching adapters.

decode     batches of 1, 8, 32, 128 with no adapter, one, eight and thirty-two, in turn over the rows
switching  each request uses another of 32 adapters in host memory, with a pool for a quarter of them
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

from engine.messages import Fill, Footprint
from gpu.results import Results
from gpu.runner.rows import Rows
from gpu.runner.shape8b import host_adapters
from model_runner.runner import Runner

BATCHES = (1, 8, 32, 128)
LANES = (0, 1, 8, 32)
RANK = 16
PROMPT = 128
STEPS = 40
REPEATS = 3
ADAPTERS = 32
SLOTS = ADAPTERS // 4
ROWS = SLOTS - 2  # two slots are left, so that they can be filled ahead
REQUEST_TOKENS = 64  # tokens that each request of `switching` generates


def run(results: Results, runner: Runner, batches: tuple[int, ...] = BATCHES) -> None:
    """Measures what is not in the results yet; the runner must be warmed up and have `ADAPTERS` lanes and slots."""
    footprint = host_adapters(runner, ADAPTERS, RANK)
    steps = results.section("steps")
    decode = steps.setdefault("decode", {})
    for batch in batches:
        for lanes in [lanes for lanes in LANES if lanes <= batch]:
            if f"b{batch}-l{lanes}" not in decode:
                decode[f"b{batch}-l{lanes}"] = decode_row(runner, footprint, batch, lanes)
                results.save()
    if "switching" not in steps:
        base, mixed = (switching(runner, footprint, adapters) for adapters in (False, True))
        steps["switching"] = {"base_tokens_per_s": base, "tokens_per_s": mixed, "of_base": mixed / base}
        results.save()


def decode_row(runner: Runner, footprint: Footprint, batch: int, lanes: int) -> dict[str, Any]:
    """Returns the milliseconds of a decode step: the median of a few runs of many steps."""
    rows = Rows(runner, batch, PROMPT, STEPS * REPEATS)
    if lanes:
        rows.point(footprint, {lane: lane for lane in range(1, lanes + 1)})
    rows.prefill([1 + row % lanes if lanes else 0 for row in range(batch)])
    seconds = statistics.median(rows.decode(STEPS) / STEPS for _ in range(REPEATS))
    return {
        "batch": batch,
        "lanes": lanes,
        "ms": seconds * 1000,
        "bytes": step_bytes(runner, footprint, batch, lanes),
        "modules": 4 * runner.parts.decoder.config.num_layers if lanes else 0,
    }


def step_bytes(runner: Runner, footprint: Footprint, batch: int, lanes: int) -> int:
    """Returns the bytes that a step reads: all weights except the embedding, the rows' KV, the adapters' pages."""
    c, decoder = runner.capacity, runner.parts.decoder
    table = decoder.embed.weight
    weights = c.weight_bytes - (0 if decoder.config.tie_embeddings else table.numel() * table.element_size())
    kv = batch * (PROMPT + STEPS * REPEATS // 2) * c.kv_bytes // ((c.kv_pages + 1) * c.page_size)
    pages = sum(c.rank_page_bytes.get(group, 0) * count for group, count in footprint.pages.items())
    return weights + kv + lanes * pages


def switching(runner: Runner, footprint: Footprint, adapters: bool, seconds: float = 8.0) -> float:
    """Returns tokens/s of `ROWS` rows whose requests end in turn; with `adapters`, each new one has another adapter."""
    rows = Rows(runner, ROWS, PROMPT, REQUEST_TOKENS)
    plan = _Slots(rows, footprint) if adapters else None
    idle, ends = deque(range(ROWS)), dict[int, int]()
    tokens, number, began = 0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        number += 1
        beginning, fills, lanes = [], [], []
        for row in [row for row, end in ends.items() if end <= number]:
            del ends[row]
            idle.append(row)
            if plan:
                plan.leave(row)
        if plan:
            fills = plan.fills()
        if idle and (plan is None or plan.ready):
            row = idle.popleft()
            beginning, ends[row] = [row], number + REQUEST_TOKENS
            if plan:
                lanes = [plan.enter(row)]
        going = [row for row in ends if row not in beginning]
        rows.launch(rows.step(begin=beginning, go_on=going, fills=fills, lanes=lanes))
        tokens += len(ends)
        states = runner.advance()
        if plan:
            plan.filled(sum(state.state == "resident" for state in states))
    rows.drain()
    return tokens / (time.perf_counter() - began)


class _Slots:
    """The slots of rank pages: free, being filled, ready, or in use by a row. Fills end in order."""

    def __init__(self, rows: Rows, footprint: Footprint) -> None:
        self._rows, self._footprint = rows, footprint
        self._free, self._filling, self.ready = deque(range(SLOTS)), deque[int](), deque[int]()
        self._held: dict[int, int] = {}
        self._left: deque[tuple[int, int]] = deque()
        self._next = 0
        self._steps = 0

    def fills(self) -> list[Fill]:
        """Returns fills for the slots that no step in flight can use."""
        self._steps += 1
        while self._left and self._left[0][0] + 3 <= self._steps:
            self._free.append(self._left.popleft()[1])
        fills = []
        while self._free:
            slot = self._free.popleft()
            self._filling.append(slot)
            self._next = self._next % ADAPTERS + 1
            fills.append(Fill(self._next, self._rows.pages(self._footprint, slot)))
        return fills

    def filled(self, count: int) -> None:
        """Marks the first `count` fills as ended."""
        for _ in range(count):
            self.ready.append(self._filling.popleft())

    def enter(self, row: int) -> Any:
        """Assigns a ready slot to a row; returns the message that sets its lane."""
        self._held[row] = self.ready.popleft()
        self._rows.lanes[row] = row + 1
        return self._rows.lane(self._footprint, row + 1, self._held[row])

    def leave(self, row: int) -> None:
        """Takes the slot from the row. `fills` reuses it only once no step in flight can use it any more."""
        self._left.append((self._steps, self._held.pop(row)))
