"""scheduler.simulate.machine: the times of steps, fills and loads, compared with values computed in the comments."""

from __future__ import annotations

import pytest
from fixtures.scheduling.small_world import PROFILE, profile_with

from engine.messages import (
    AdapterState,
    Chunk,
    EvictAdapter,
    Fill,
    LanePages,
    LoadAdapter,
    Step,
    StepDone,
)
from scheduler.simulate.machine import NEVER, Machine, adapter_on_disk
from scheduler.simulate.profile import Profile, StepCost


def machine(profile: Profile = PROFILE, adapters: int = 4) -> Machine:
    return Machine(profile, {number: adapter_on_disk(profile, f"a{number}") for number in range(1, adapters + 1)})


def step(number: int, rows: int = 0, prompt: int = 0, fills: list[int] | None = None) -> Step:
    chunks = [Chunk(row=row, generation=1, start=9, length=1, lane=0) for row in range(rows)]
    if prompt:
        chunks.append(Chunk(row=99, generation=1, start=0, length=prompt, lane=0, tokens=[1] * prompt))
    pages = {"qkv": [0], "down": [0]}
    return Step(epoch=0, id=number, chunks=chunks, fills=[Fill(adapter_id, pages) for adapter_id in fills or []])


def drain(found: Machine) -> list[tuple[float, str]]:
    out = []
    while found.next_event < NEVER:
        expected = found.next_event
        when, message = found.pop()
        assert when == pytest.approx(expected)
        name = f"step {message.id}" if isinstance(message, StepDone) else f"{message.adapter_id} {message.state}"
        out.append((round(when, 6), name))
    return out


def test_step_costs_its_rows_and_prompt_tokens() -> None:
    found = machine()
    found.accept(step(1, rows=3, prompt=20), 1.0)
    when, done = found.pop()
    assert when == pytest.approx(1.0 + 0.010 + 3 * 0.001 + 20 * 0.0001)
    assert isinstance(done, StepDone)
    assert len(done.tokens) == 4
    assert found.busy == pytest.approx(0.015)


def test_step_costs_its_context_and_lanes() -> None:
    costs = StepCost(base=0.0, context_token=0.001, lane=0.1, lane_byte=1e-6)
    found = machine(profile_with(step=costs))
    chunks = [Chunk(row=row, generation=1, start=9, length=1, lane=2) for row in range(2)]
    lanes = [LanePages(2, {"qkv": [(5, 1.0)], "down": [(6, 1.0)]})]
    found.accept(Step(epoch=0, id=1, lanes=lanes, chunks=chunks), 0.0)
    assert drain(found) == [(round(2 * 10 * 0.001 + 0.1 + 16 * 500_000 * 1e-6, 6), "step 1")]


def test_steps_run_one_by_one_with_half_a_gap_on_each_side() -> None:
    found = machine(profile_with(gap=0.004))
    found.accept(step(1, rows=1), 0.0)  # 2 ms to the runner, 11 ms of step, 2 ms back
    found.accept(step(2, rows=1), 0.0)  # begins right after step 1
    assert drain(found) == [(0.015, "step 1"), (0.026, "step 2")]


def test_loads_wait_for_a_free_loader() -> None:
    found = machine(profile_with(loaders=2))
    for adapter_id in (1, 2, 3):
        found.accept(LoadAdapter(adapter_id=adapter_id, path="x"), 0.0)
    found.accept(EvictAdapter(4), 0.01)
    assert drain(found) == [(0.01, "4 disk"), (0.08, "1 host"), (0.08, "2 host"), (0.16, "3 host")]


def test_fills_beside_the_steps_run_one_by_one() -> None:
    found = machine()
    found.accept(step(1, rows=1, fills=[1, 2]), 0.0)
    assert drain(found) == [(0.008, "1 resident"), (0.011, "step 1"), (0.016, "2 resident")]


def test_fills_between_steps_take_a_share_of_each_step() -> None:
    found = machine(profile_with(fill_share=0.5))
    found.accept(step(1, rows=1, fills=[1, 2]), 0.0)
    assert found.pop()[0] == pytest.approx(0.011)
    found.accept(step(2, rows=1), 0.011)  # 5.5 of the 8 ms of the first fill follow step 1
    assert drain(found) == [
        (0.0275, "step 2"),  # ms: step 1 for 11, fills for 5.5, step 2 for 11
        (0.03, "1 resident"),  # the other 2.5 ms of the first fill
        (0.038, "2 resident"),  # 3 ms in the fills' share of step 2, and 5 ms while idle
    ]


def test_fills_use_all_idle_time() -> None:
    found = machine(profile_with(fill_share=0.1))
    found.accept(step(1, fills=[1]), 0.0)
    assert found.pop()[0] == 0.0
    found.accept(step(2, rows=1), 0.005)  # 3 ms of the fill are left, and its share after step 2 is 1.1 ms
    assert found.pop()[0] == pytest.approx(0.016)
    assert found.next_event == pytest.approx(0.016 + 0.003)


def test_step_waits_for_its_immediate_fills() -> None:
    found = machine(profile_with(fill_share=0.5))
    pages = {"qkv": [0], "down": [0]}
    chunks = [Chunk(row=0, generation=1, start=9, length=1, lane=1)]
    lanes = [LanePages(1, {"qkv": [(0, 1.0)], "down": [(0, 1.0)]})]
    found.accept(Step(epoch=0, id=1, fills=[Fill(1, pages, True)], lanes=lanes, chunks=chunks), 0.0)
    assert drain(found) == [(0.008, "1 resident"), (0.019, "step 1")]


def test_instant_loads_and_fills_take_no_time() -> None:
    found = machine(profile_with(fill_share=0.1, gap=0.01))
    found.instant = True
    found.accept(LoadAdapter(adapter_id=1, path="x"), 0.0)
    found.accept(step(1, fills=[1]), 0.0)
    assert {when for when, _ in drain(found)} == {0.0}


def test_ranks_do_not_depend_on_popularity() -> None:
    profile = profile_with(lora_ranks=[4, 16])
    ranks = [adapter_on_disk(profile, f"a{number}").rank for number in range(200)]
    assert 60 < ranks.count(4) < 140
    assert 5 < ranks[:20].count(4) < 15
    found = machine(profile)
    found.accept(LoadAdapter(adapter_id=1, path="x"), 0.0)
    _, state = found.pop()
    assert isinstance(state, AdapterState)
    assert state.bytes == adapter_on_disk(profile, "a1").rank * 500_000
