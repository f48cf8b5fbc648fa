"""Requests without a scheduler: rows that prefill, then decode with two steps in flight, each with its lane.

Each row keeps its KV pages for all of its requests.
"""

from __future__ import annotations

import time

from engine.messages import Chunk, Fill, Footprint, LanePages, NewRow, Sampling, Step
from model_runner.launched_step import LaunchedStep
from model_runner.runner import Runner

GREEDY = Sampling(temperature=0.0)


class Rows:
    """`batch` rows of one runner, each with room for `prompt` and `max_new` more tokens."""

    def __init__(self, runner: Runner, batch: int, prompt: int, max_new: int) -> None:
        self.runner, self.prompt, self.max_new = runner, prompt, max_new
        self.lanes = [0] * batch
        self.lengths = [0] * batch
        self._generations = [0] * batch
        self._each = -(-(prompt + max_new) // runner.capacity.page_size)
        self._ids = 0
        self._launched: list[LaunchedStep] = []
        runner.reset()

    def point(self, footprint: Footprint, slots: dict[int, int]) -> None:
        """Fills adapter `slots[lane]` into slot `slots[lane]` - 1 of the rank pages and sets the lane to it.

        Returns when both are done.
        """
        fills = [Fill(adapter, self.pages(footprint, adapter - 1)) for adapter in slots.values()]
        self.runner.execute(self.step(fills=fills))
        waiting = len(fills)
        while waiting:
            waiting -= sum(state.state == "resident" for state in self.runner.advance())
        self.runner.execute(self.step(lanes=[self.lane(footprint, lane, slot - 1) for lane, slot in slots.items()]))

    def pages(self, footprint: Footprint, slot: int) -> dict[str, list[int]]:
        """Returns the rank pages of a slot, by group."""
        return {group: list(range(slot * n, slot * n + n)) for group, n in footprint.pages.items()}

    def lane(self, footprint: Footprint, lane: int, slot: int) -> LanePages:
        """Returns the message that sets a lane to a slot."""
        pages = self.pages(footprint, slot)
        return LanePages(lane, {group: [(page, 1.0) for page in held] for group, held in pages.items()})

    def prefill(self, lanes: list[int]) -> None:
        """Prefills a new request in each row, with its lane in `lanes`, and waits for the steps."""
        tokens = self.runner.capacity.max_batched_tokens // self.prompt
        for first in range(0, len(lanes), max(1, tokens)):
            some = range(first, min(len(lanes), first + max(1, tokens)))
            for row in some:
                self.lanes[row] = lanes[row]
            self.runner.execute(self.step(begin=list(some)))

    def decode(self, steps: int) -> float:
        """Runs `steps` decode steps of all rows and returns their seconds."""
        began = time.perf_counter()
        for _ in range(steps):
            self.launch(self.step(go_on=list(range(len(self.lanes)))))
        self.drain()
        return time.perf_counter() - began

    def launch(self, step: Step) -> None:
        """Launches a step behind the one in flight; waits for the step before that."""
        self._launched.append(self.runner.launch(step))
        if len(self._launched) > 2:
            self.runner.finish(self._launched.pop(0))

    def drain(self) -> None:
        """Waits for all steps in flight."""
        while self._launched:
            self.runner.finish(self._launched.pop(0))

    def step(
        self,
        begin: list[int] | None = None,
        go_on: list[int] | None = None,
        fills: list[Fill] | None = None,
        lanes: list[LanePages] | None = None,
    ) -> Step:
        """Returns a step: new requests in the rows `begin`, one more token in the rows `go_on`."""
        self._ids += 1
        new_rows, chunks = [], []
        for row in go_on or []:
            chunks.append(self._chunk(row, self.lengths[row], []))
            self.lengths[row] += 1
        for row in begin or []:
            self._generations[row] += 1
            tokens = [17 + (row + place) % 1000 for place in range(self.prompt)]
            generation = self._generations[row]
            new_rows.append(NewRow(row=row, generation=generation, prompt_length=self.prompt, sampling=GREEDY))
            chunks.append(self._chunk(row, 0, tokens))
            self.lengths[row] = self.prompt
        return Step(epoch=0, id=self._ids, fills=fills or [], lanes=lanes or [], new_rows=new_rows, chunks=chunks)

    def _chunk(self, row: int, start: int, tokens: list[int]) -> Chunk:
        return Chunk(
            row=row,
            generation=self._generations[row],
            start=start,
            length=len(tokens) or 1,
            lane=self.lanes[row],
            tokens=tokens,
            pages=list(range(1 + row * self._each, 1 + (row + 1) * self._each)) if tokens else [],
        )
