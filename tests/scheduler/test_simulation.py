"""Seeded random workloads of many kinds, most with windows of 1 to 3 steps: see simulation.Simulation."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from fixtures.scheduling.simulation.seeded_world import World
from fixtures.scheduling.simulation.simulation import Simulation

from scheduler.adapters.stamp_order import Policy


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_tight_memory(seed: int, window: int) -> None:
    """With few KV pages, requests are preempted all the time, and continue with their tokens."""
    pool, heavy = {"qkv": 6, "down": 6}, {"scored_rate": 0.6, "endless_rate": 0.8, "prompt": 16}
    world = World(seed, window, adapters=3, rows=8, kv_pages=24, budget=8, pool=pool, step_rate=0.15, **heavy)
    sim = Simulation(world).run()
    assert sim.core.stats().preemptions >= 5


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_many_adapters_few_lanes(seed: int, window: int) -> None:
    """There are more adapters than the pool holds: fills, evictions and mixes while requests decode."""
    sim = Simulation(World(100 + seed, window, requests=50, adapters=12, kv_pages=30, rows=8, step_rate=0.3)).run()
    stats = sim.core.stats()
    assert stats.adapter_evictions > 0
    assert stats.adapter_fills > 12
    assert sim.runner.widest == 2


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_lanes_are_drained_and_preempted(seed: int, window: int) -> None:
    """With a lora_max_wait of a few steps, lanes drain and are preempted all the time, and no token is lost."""
    rates = {"mix_rate": 0.2, "preload_rate": 0.2, "abort_rate": 0.05, "endless_rate": 0.6}
    world = World(700 + seed, window, requests=50, adapters=10, rows=8, kv_pages=60, max_wait=8.0, **rates)
    assert Simulation(world).run().core.stats().lane_preemptions > 3


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_faults_of_all_kinds(seed: int, window: int) -> None:
    """A workload with aborts, unloads, pins, adapters that fail and runners that die."""
    faults = {"abort_rate": 0.2, "reset_rate": 0.02, "churn_rate": 0.1, "faulty_rate": 0.3, "mix_rate": 0.3}
    waits = 20.0 if seed % 2 else 1e6
    world = World(200 + seed, window, requests=60, adapters=8, max_loras=3, step_rate=0.7, max_wait=waits, **faults)
    Simulation(world).run()


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_prompts_with_common_prefixes(seed: int, window: int) -> None:
    """Conversations of two tenants with several adapters, some of equal bytes; with 24 KV pages, pages are evicted."""
    faults = {"abort_rate": 0.1, "reset_rate": 0.01, "churn_rate": 0.1, "twin_rate": 0.4} if seed % 2 else {}
    pages = 200 if seed % 4 < 2 else 24
    alike = {"share_rate": 0.8, "tenants": 2, **faults}
    world = World(600 + seed, window, adapters=4, kv_pages=pages, rows=8, budget=16, **alike)
    stats = Simulation(world).run().core.stats()
    assert stats.cached_tokens > 0
    assert pages > 24 or stats.kv_evictions > 0


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_activated_adapters(seed: int, window: int) -> None:
    """Conversations with and without invocations; adapters are unloaded, reloaded or of equal bytes; few KV pages."""
    faults = {"abort_rate": 0.1, "reset_rate": 0.02, "churn_rate": 0.1, "twin_rate": 0.3} if seed % 2 else {}
    tier: dict[str, Any] = {"max_loaded": 3} if seed % 3 == 2 else {}
    pages = 200 if seed % 4 < 2 else 24
    alike = {"share_rate": 0.8, "activated_rate": 0.7, "mix_rate": 0.05, **faults}
    world = World(800 + seed, window, adapters=5, kv_pages=pages, rows=8, budget=16, **alike, **tier)
    sim = Simulation(world).run()
    assert sim.core.stats().cached_tokens > 0
    assert sim.library.invocations


@pytest.mark.parametrize("window", [1, 2, 3])
def test_no_page_is_shared_without_the_prefix_cache(window: int) -> None:
    """Without the prefix cache, no KV page stays in use after its request ends."""
    sim = Simulation(World(650, window, adapters=2, rows=8, share_rate=0.8, prefix_cache=False)).run()
    stats = sim.core.stats()
    assert (sim.runner.tokens_shared, stats.cached_tokens, stats.kv_pages_cached) == (0, 0, 0)


@pytest.mark.parametrize("window", [1, 2])
def test_thousands_of_adapters(window: int) -> None:
    """Requests for 2,000 adapters, with a pool for a few dozen of them and eight lanes."""
    world = World(
        7,
        window,
        requests=1500,
        adapters=2000,
        rows=32,
        kv_pages=300,
        budget=64,
        max_loras=8,
        pool={"qkv": 40, "down": 40},
        step_rate=0.3,
        check_every=200,
    )
    sim = Simulation(world).run()
    assert sim.core.stats().adapter_fills > 300


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_small_host_cache(seed: int, window: int) -> None:
    """The host cache holds fewer copies than there are adapters: loads, evictions and fills happen all the time."""
    tier: dict[str, Any] = {"max_loaded": 3 + seed % 3} if seed % 2 else {"host_bytes": 900}
    policy: Policy = "fifo" if seed % 4 > 1 else "lru"
    world = World(300 + seed, window, requests=60, adapters=14, rows=8, kv_pages=30, policy=policy, **tier)
    stats = Simulation(world).run().core.stats()
    assert stats.adapter_loads > 14
    assert stats.host_evictions > 10


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_adapters_of_equal_bytes_share_one_copy(seed: int, window: int) -> None:
    """About half of the adapters have the same bytes as another one; with some seeds, adapters are also unloaded."""
    tier: dict[str, Any] = {"max_loaded": 5} if seed % 2 else {}
    rates = {"twin_rate": 0.5, "mix_rate": 0.4, "churn_rate": 0.05 * (seed % 3), "preload_rate": 0.3}
    world = World(400 + seed, window, requests=60, adapters=14, rows=8, kv_pages=30, max_loras=3, **rates, **tier)
    Simulation(world).run()


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(14))
def test_faults_of_all_kinds_in_a_small_host_cache(seed: int, window: int) -> None:
    """A workload with files that vanish or change, equal bytes, pins, preloads, unloads, aborts and dead runners."""
    faults = {"abort_rate": 0.1, "reset_rate": 0.02, "churn_rate": 0.15, "faulty_rate": 0.1, "file_rate": 0.1}
    tier: dict[str, Any] = [{"max_loaded": 4}, {"host_bytes": 1000}, {"max_loaded": 6, "host_bytes": 900}][seed % 3]
    rates = faults | {"twin_rate": 0.3, "mix_rate": 0.3, "preload_rate": 0.2}
    policy: Policy = "fifo" if seed % 2 else "lru"
    world = World(500 + seed, window, requests=70, adapters=12, max_loras=3, policy=policy, **rates, **tier)
    Simulation(world).run()


@pytest.mark.parametrize("window", [1, 2])
def test_thousands_of_adapters_in_a_small_host_cache(window: int) -> None:
    """Requests for 3,000 adapters, about a third of which equal another one, with a host cache for 50 of them."""
    world = World(
        8,
        window,
        requests=1200,
        adapters=3000,
        rows=32,
        kv_pages=300,
        budget=64,
        max_loras=8,
        pool={"qkv": 40, "down": 40},
        step_rate=0.3,
        check_every=400,
        max_loaded=50,
        twin_rate=0.3,
    )
    stats = Simulation(world).run().core.stats()
    assert stats.host_evictions > 1000


def test_no_object_is_left_in_a_reference_cycle() -> None:
    """The scheduler process runs without the cyclic garbage collector, so reference cycles would be leaks."""
    rates = {"abort_rate": 0.1, "churn_rate": 0.2, "twin_rate": 0.4, "reset_rate": 0.02, "share_rate": 0.5}
    gc.collect()
    gc.disable()
    try:
        sim = Simulation(World(9, 2, requests=100, **rates)).run()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = {type(thing).__name__ for thing in gc.garbage if type(thing).__module__.startswith("scheduler")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert sim.resets > 0
    assert not left


def test_same_seed_gives_the_same_run() -> None:
    """The core's decisions do not depend on random numbers, real time or the order of a set."""
    one, two = (Simulation(World(3, 2, abort_rate=0.1)).run() for _ in range(2))
    assert one.steps == two.steps
    assert one.runner.tokens_computed == two.runner.tokens_computed
