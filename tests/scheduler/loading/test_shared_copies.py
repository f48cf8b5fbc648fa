"""scheduler.loading.lifecycle: adapters of one revision share a copy, and with it pages, lane and files."""

from __future__ import annotations

from fixtures.scheduling.by_hand import add_adapter, capacity_of, done, generate, new_core, plan_of
from fixtures.scheduling.loads_by_hand import (
    answer_eviction,
    answer_load,
    core_without_free_pages,
    load,
    of_kind,
    states_of,
)

from engine.messages import (
    AdapterState,
    LoadAdapter,
    RunnerReady,
    UnloadAdapter,
)


def test_names_of_one_revision_share_pages_and_a_lane() -> None:
    core = new_core(rank_pages={"qkv": 4})
    add_adapter(core, 1)
    core.handle(generate(1, prompt=1, lora=[(1, 1.0)]), 0.0)
    load(core, 2)
    core.handle(generate(2, prompt=1, lora=[(2, 1.0)]), 0.0)
    sent = answer_load(core, 2, revision="r1")
    assert of_kind(sent, UnloadAdapter) == [UnloadAdapter(2)]
    assert [(s.adapter_id, s.state, s.revision) for s in of_kind(sent, AdapterState)] == [(2, "resident", "r1")]
    assert core.handle(AdapterState(adapter_id=2, state="gone"), 0.0) == []
    step = plan_of(core)
    assert [chunk.lane for chunk in step.chunks] == [1, 1]
    assert step.lanes[0].pages["qkv"][0][1] == 1.0
    stats = core.stats()
    assert (stats.resident, stats.rank_pages_used, stats.host_adapters) == ([1, 2], {"qkv": 1}, 1)
    assert stats.running_adapters == {1: 1, 2: 1}


def test_copy_outlives_its_first_name() -> None:
    core = new_core(rank_pages={"qkv": 4})
    add_adapter(core, 1)
    load(core, 2)
    answer_load(core, 2, revision="r1")
    core.handle(AdapterState(adapter_id=2, state="gone"), 0.0)
    assert states_of(core.handle(UnloadAdapter(1), 0.0)) == [(1, "draining"), (1, "gone")]
    core.check()
    core.handle(generate(1, max_tokens=1, lora=[(2, 1.0)]), 0.0)
    done(core, plan_of(core))
    sent = core.handle(UnloadAdapter(2), 0.0)
    assert (states_of(sent), of_kind(sent, UnloadAdapter)) == ([(2, "draining")], [UnloadAdapter(1)])
    assert states_of(core.handle(AdapterState(adapter_id=1, state="gone"), 0.0)) == [(2, "gone")]
    core.check()
    assert (core.stats().rank_pages_used, core.stats().host_adapters) == ({"qkv": 0}, 0)


def test_mix_of_two_names_of_one_copy_sums_their_scales() -> None:
    core = new_core(rank_pages={"qkv": 4})
    add_adapter(core, 1)
    load(core, 2)
    core.handle(generate(1, lora=[(1, 0.5), (2, -0.25)]), 0.0)
    answer_load(core, 2, revision="r1")
    assert [scale for _, scale in plan_of(core).lanes[0].pages["qkv"]] == [0.25]


def test_failed_load_is_retried_with_another_names_path() -> None:
    core = core_without_free_pages(max_loaded_loras=2)
    load(core, 1)
    answer_load(core, 1)
    load(core, 2)
    answer_eviction(core, 1)
    sent = answer_load(core, 2, revision="r1")
    assert of_kind(sent, UnloadAdapter) == [UnloadAdapter(1)], "the first copy was on disk: the second is kept"
    assert states_of(sent) == [(1, "host"), (2, "host")]
    core.handle(RunnerReady(epoch=0, capacity=capacity_of()), 0.0)
    sent = core.handle(AdapterState(adapter_id=2, state="failed", error="gone"), 0.0)
    assert [sent_load.path for sent_load in of_kind(sent, LoadAdapter)] == ["p2"]


def test_id_of_a_removed_name_is_not_accepted_again() -> None:
    core = new_core()
    add_adapter(core, 1)
    load(core, 2)
    answer_load(core, 2, revision="r1")
    core.handle(UnloadAdapter(1), 0.0)
    (state,) = load(core, 1)
    assert (state.state, "used before" in state.error) == ("failed", True)
