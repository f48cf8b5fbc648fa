"""Requests and adapters that end the runner: only these fail, and all other requests get every token.

Most tests use seeded random workloads.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import pytest
from fixtures.scheduling.by_hand import capacity_of, done, generate, new_core, plan_of
from fixtures.scheduling.fake_runner.runner import FakeRunner
from fixtures.scheduling.simulation.seeded_world import Client, World
from fixtures.scheduling.simulation.simulation import Simulation
from fixtures.scheduling.simulation.verdict import Verdict
from msgspec.structs import replace

from engine.messages import Abort, Fill, Generate, Progress, RunnerReady, Sampling, Step
from scheduler.batching.isolation import ASIDE, ENDED, POISON
from scheduler.core import Scheduler


class Poisoned(Simulation):
    """A simulation whose runner dies at given positions of requests, and when it fills given adapters.

    `poison`: position by request id; `fills`: adapter contents; `own`: the runner fails, otherwise it is killed.
    """

    def __init__(self, world: World, poison: dict[int, int], fills: Set[int] = frozenset(), own: bool = True) -> None:
        self.poison, self.fills, self.own = poison, fills, own
        self.deaths = 0
        self.filling: set[int] = set()
        super().__init__(world)

    def _generate(self, request_id: int) -> Generate:
        """Returns the message of a request; a poison request has no generated tokens yet, so it computes some."""
        message = super()._generate(request_id)
        return replace(message, generated=[]) if request_id in self.poison else message

    def _end_step(self) -> None:
        step = self.runner.queue[0]
        if self._is_deadly(step):
            self._die()
        else:
            super()._end_step()

    def _is_deadly(self, step: Step) -> bool:
        in_flight = self.core._state.in_flight[0]
        hits = any(
            chunk.start <= self.poison.get(request.id, -1) < chunk.start + chunk.length
            for (request, _, _), chunk in zip(in_flight.parts, step.chunks, strict=True)
        )
        return hits or any(self.library.content(fill.adapter_id) in self.fills for fill in step.fills)

    def _die(self) -> None:
        self.deaths += 1
        assert self.deaths <= 16, "the supervisor would have given up"
        self.dead.append(self.runner)
        self.runner = FakeRunner(self.capacity, self.library, self.runner.epoch + 1, max_host=self.world.max_loaded)
        self._send(RunnerReady(epoch=self.runner.epoch, capacity=self.capacity, after_fault=self.own))

    def _check_error(self, client: Client, verdict: Verdict) -> None:
        if client.error == ENDED:
            assert client.message.request_id in self.poison
        elif client.error == ASIDE:
            assert {self.library.content(i) for i, _ in client.message.lora} & self.fills
        else:
            super()._check_error(client, verdict)

    @property
    def failed(self) -> set[int]:
        return {i for i, client in self.clients.items() if client.error == ENDED}


def _computed(client: Client, position: int) -> bool:
    """Returns whether a request that ran to its end computed `position`."""
    return position < len(client.message.prompt) + len(client.tokens) - 1


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_two_poison_requests_fail_alone(seed: int, window: int) -> None:
    """One request ends the runner at its first token, another at position 12.

    Odd seeds add aborts, deaths of the runner without a cause, and adapters that are unloaded.
    """
    faults = {"abort_rate": 0.1, "reset_rate": 0.02, "churn_rate": 0.05} if seed % 2 else {}
    tier: dict[str, Any] = {"max_loaded": 3} if seed % 3 == 2 else {}
    world = World(900 + seed, window, requests=40, adapters=6, kv_pages=30, rows=8, prompt=12, **faults, **tier)
    sim = Poisoned(world, {7: 0, 20: 12}).run()
    assert sim.deaths <= 2 * 2 + (4 if faults else 0)
    for request_id, position in sim.poison.items():
        client = sim.clients[request_id]
        assert client.error is not None or client.aborted or not _computed(client, position)
    assert 7 in sim.failed or sim.clients[7].aborted or sim.clients[7].error


@pytest.mark.parametrize("window", [1, 2, 3])
def test_poison_request_costs_two_faults(window: int) -> None:
    sim = Poisoned(World(950, window, requests=30, adapters=4, kv_pages=60, rows=8), {9: 0}).run()
    assert (sim.deaths, sim.failed) == (2, {9})


@pytest.mark.parametrize("window", [1, 2, 3])
def test_poison_request_costs_five_kills(window: int) -> None:
    sim = Poisoned(World(951, window, requests=30, adapters=4, kv_pages=60, rows=8), {9: 0}, own=False).run()
    assert (sim.deaths, sim.failed) == (5, {9})


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_poison_adapter_is_set_aside(seed: int, window: int) -> None:
    world = World(960 + seed, window, requests=40, adapters=5, kv_pages=60, rows=8, mix_rate=0.0)
    sim = Poisoned(world, {}, {1}).run()
    assert not sim.failed
    assert 2 <= sim.deaths <= 5
    assert any(client.error == ASIDE for client in sim.clients.values()) or sim.states[1].error == ASIDE


@pytest.mark.parametrize("seed", range(4))
def test_adapter_set_aside_is_served_after_a_new_load(seed: int) -> None:
    """An adapter that was set aside stays so under a new runner, and is served once its files are loaded again."""
    sim = Poisoned(World(960 + seed, requests=40, adapters=5, kv_pages=60, rows=8, mix_rate=0.0), {}, {1}).run()
    sim._reset()
    sim._resend()
    assert sim.states[1].error == ASIDE
    sim.fills = frozenset()
    sim._load_again(1)
    while sim.runner.events or sim.runner.queue:
        sim._next_event()
    assert sim.states[max(sim.loaded)].state in ("host", "resident")


def _generate(request_id: int) -> Generate:
    return generate(request_id, max_tokens=9, sampling=Sampling(seed=request_id))


def _requests_of(step: Step, rows: dict[int, int]) -> list[int]:
    """Returns the requests of a step's chunks. `rows` records the request in each row; a request's seed is its id."""
    rows |= {new.row: new.sampling.seed for new in step.new_rows}
    return [rows[chunk.row] for chunk in step.chunks]


def _core_with_steps(window: int = 1) -> tuple[Scheduler, list[Step]]:
    core = new_core(window)
    for number in (1, 2):
        core.handle(_generate(number), 0.0)
    return core, [plan_of(core) for _ in range(window)]


def _die(core: Scheduler, epoch: int, own: bool = True) -> list[Any]:
    sent = core.handle(RunnerReady(epoch=epoch, capacity=capacity_of(), after_fault=own), 0.0)
    core.check()
    return [update for message in sent if isinstance(message, Progress) for update in message.updates]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_suspects_run_one_at_a_time(window: int) -> None:
    core, _ = _core_with_steps(window)
    assert _die(core, 1) == []
    core.handle(_generate(3), 0.0)
    seen: list[list[int]] = []
    rows: dict[int, int] = {}
    steps: list[Step] = []
    while True:
        while (step := core.plan(0.0)) is not None:
            steps.append(step)
            seen.append(_requests_of(step, rows))
        if not steps:
            break
        core.check()
        done(core, steps.pop(0))
    alone = [ids for ids in seen if len(ids) == 1]
    assert alone[0] == [1]
    assert [2] in alone
    assert [3] not in seen[: seen.index([2])]
    assert any(len(ids) == 3 for ids in seen), "then all requests run together"


def test_error_has_a_code_and_follows_the_tokens_so_far() -> None:
    core, (step,) = _core_with_steps()
    done(core, step)
    assert plan_of(core)
    _die(core, 1)
    plan_of(core)
    (update,) = _die(core, 2)
    assert (update.request_id, update.index, update.error, update.code) == (1, 1, ENDED, POISON)


def test_aborted_suspect_lets_the_next_one_run() -> None:
    core, _ = _core_with_steps()
    _die(core, 1)
    step = plan_of(core)
    core.handle(Abort(0, 1), 0.0)
    assert core.plan(0.0) is None, "its step is still in flight"
    done(core, step)
    step = plan_of(core)
    assert len(step.new_rows) == 1
    assert _requests_of(step, {}) == [2]


def test_new_scheduler_finds_the_poison_request_again() -> None:
    core, _ = _core_with_steps()
    _die(core, 1)
    core, _ = _core_with_steps()  # a new scheduler; the tokenizer process submits the requests again
    assert _die(core, 1) == []
    plan_of(core)
    (update,) = _die(core, 2)
    assert update.error == ENDED


def test_fill_for_a_suspect_is_alone_in_its_step() -> None:
    sim = Poisoned(World(970, 2, requests=30, adapters=4, kv_pages=60, rows=8), {9: 0, 12: 1})
    alone: list[list[Fill]] = []
    accept = FakeRunner.accept

    def watch(runner: FakeRunner, message: Any) -> None:
        if isinstance(message, Step) and message.fills and len(sim.core._state.blame):
            assert not message.chunks
            alone.append(message.fills)
        accept(runner, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeRunner, "accept", watch)
        sim.run()
    assert alone
