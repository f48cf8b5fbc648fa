"""Seeded random workloads: the pure scheduler against a fake runner that verifies every message and every token.

The world around the scheduler is a set of things that may happen next (a request, an abort, an adapter's word, a step's
end, a new runner); a seed chooses. After every call the books are proved; at the end every request has ended exactly
once, with the tokens it would have had alone.
"""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_runner import FakeRunner, Library, oracle
from fake_runner import tenant as tenant_of

from engine.messages import (
    Abort,
    AdapterState,
    Capacity,
    EvictAdapter,
    Footprint,
    Generate,
    LoadAdapter,
    PinAdapter,
    Progress,
    RunnerReady,
    Sampling,
    Stats,
    Step,
    Stopping,
    ToScheduler,
    UnloadAdapter,
    Update,
)
from scheduler.books import Bounds
from scheduler.core import Scheduler
from scheduler.eviction import Policy


@dataclass
class Client:
    """What the tokenizer process knows of one request."""

    message: Generate
    tokens: list[int]
    finish: str | None = None
    matched: int | None = None
    error: str | None = None
    aborted: bool = False
    scores: list[int] | None = None

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.error is not None

    def take(self, update: Update) -> None:
        assert not self.ended, f"request {update.request_id} goes on after its end: {update}"
        assert update.index == len(self.tokens), f"index {update.index}, but {len(self.tokens)} tokens are known"
        self.tokens += update.tokens
        self.finish, self.matched, self.error = update.finish, update.matched, update.error
        wanted = self.message.sampling.logprobs >= 0 and update.tokens
        assert [p.token_id for p in update.logprobs or []] == (update.tokens if wanted else [])
        if update.prompt_logprobs is not None:
            assert self.scores is None, "the prompt's logprobs came twice"
            assert [p.token_id for p in update.prompt_logprobs] == self.message.prompt[1:]
            self.scores = [int(-p.logprob) for p in update.prompt_logprobs]


@dataclass
class World:
    """Numbers of one workload."""

    seed: int
    window: int = 1
    requests: int = 40
    adapters: int = 6
    rows: int = 6
    kv_pages: int = 12
    page_size: int = 4
    budget: int = 10
    max_loras: int = 2
    pool: dict[str, int] = field(default_factory=lambda: {"qkv": 4, "down": 3})
    max_length: int = 40
    abort_rate: float = 0.0
    reset_rate: float = 0.0
    churn_rate: float = 0.0  # loads, unloads, pins
    faulty_rate: float = 0.0
    mix_rate: float = 0.1
    step_rate: float = 0.5  # how readily the runner ends a step
    scored_rate: float = 0.3
    endless_rate: float = 0.25
    prompt: int = 40
    check_every: int = 1
    max_loaded: int | None = None
    host_bytes: int | None = None
    policy: Policy = "lru"
    twin_rate: float = 0.0  # how many adapters have the bytes of another
    file_rate: float = 0.0  # files that vanish, change, or come back
    preload_rate: float = 0.0
    max_wait: float = 50.0  # in calls
    share_rate: float = 0.0  # how many prompts begin like another, or go on where one ended
    tenants: int = 1
    prefix_cache: bool = True


class Simulation:
    """One workload, run to the end by run()."""

    def __init__(self, world: World) -> None:
        self.world, self.rng = world, random.Random(world.seed)
        self.capacity = self._capacity()
        self.doubtful: set[int] = set()  # contents whose files were once unreadable
        self.library = self._library()
        self.runner = FakeRunner(self.capacity, self.library, max_host=world.max_loaded)
        self.dead: list[FakeRunner] = []
        bounds = Bounds(
            world.max_loras,
            world.max_loaded,
            world.host_bytes,
            world.policy,
            lora_max_wait=world.max_wait,
            prefix_cache=world.prefix_cache,
        )
        self.core = Scheduler(self.capacity, bounds, world.window)
        self.clients: dict[int, Client] = {}
        self.states: dict[int, AdapterState] = {}
        self.gone: list[int] = []
        self.loaded: set[int] = set()
        self.unloaded: set[int] = set()
        self.calls = self.steps = self.resets = 0
        self.open: set[int] = set()
        self._take(self.core.take())

    # ----------------------------------------------------------------------------------------------- the workload

    def _capacity(self) -> Capacity:
        w = self.world
        return Capacity(
            kv_pages=w.kv_pages,
            page_size=w.page_size,
            rows=w.rows,
            max_length=w.max_length,
            max_batched_tokens=w.budget,
            vocab_size=97,
            max_loras=w.max_loras,
            rank_pages=w.pool,
            max_lora_rank=32,
            max_lane_pages=4,
        )

    def _library(self) -> Library:
        library = Library()
        for adapter_id in range(1, self.world.adapters + 1):
            groups = self.rng.choice([["qkv"], ["down"], ["qkv", "down"], ["qkv", "down"]])
            library.footprints[adapter_id] = Footprint({g: self.rng.choice([1, 1, 2]) for g in groups})
            library.sizes[adapter_id] = self.rng.choice([1, 2, 3]) * 100
            if adapter_id > 1 and self.rng.random() < self.world.twin_rate:
                library.twins[adapter_id] = library.content(self.rng.randrange(1, adapter_id))
                continue
            if self.rng.random() < self.world.faulty_rate:
                self.rng.choice([library.fails_to_load, library.fails_to_fill]).add(adapter_id)
                self.doubtful.add(adapter_id)
                if self.rng.random() < 0.3:  # larger than the pool
                    library.footprints[adapter_id] = Footprint({"qkv": 99})
        return library

    def _generate(self, request_id: int) -> Generate:
        rng = self.rng
        ends = rng.sample(range(97), rng.choice([0, 1, 8]))
        minimum = rng.choice([0, 0, 3])
        endless = rng.random() < self.world.endless_rate
        penalty = rng.choice([1.0, 1.0, 1.2])
        like = self._like()
        tenant = tenant_of(like.message.sampling) if like and rng.random() < 0.7 else rng.randrange(self.world.tenants)
        sampling = Sampling(
            seed=tenant * 1000 + rng.randrange(1000),
            min_tokens=minimum,
            end_ids=ends,
            repetition_penalty=penalty,
            logprobs=rng.choice([-1, 0, 2]),
            prompt_logprobs=0 if rng.random() < self.world.scored_rate else -1,
        )
        return Generate(
            epoch=0,
            request_id=request_id,
            prompt=self._prompt(like),
            generated=[rng.randrange(97) for _ in range(rng.choice([0, 0, 0, 2]))],
            lora=self._selection(like),
            sampling=sampling,
            stopping=Stopping(1000 if endless else rng.choice([1, 5, 12]), minimum, ends),
            priority=rng.choice([0, 0, 1]),
            salt=f"tenant {tenant}",
        )

    def _like(self) -> Client | None:
        """One of the last requests, if the next is to resemble it."""
        if not self.world.share_rate or not self.clients or self.rng.random() > self.world.share_rate:
            return None
        return self.clients[len(self.clients) - self.rng.randrange(min(8, len(self.clients)))]

    def _prompt(self, like: Client | None) -> list[int]:
        """Random tokens; or what `like` was asked and answered, up to some point, and a little more."""
        rng, longest = self.rng, self.world.prompt
        length = rng.choice([1, 2, 7, rng.randrange(1, longest)])
        if like is None:
            return [rng.randrange(97) for _ in range(length)]
        known = like.message.prompt + like.tokens
        tail = [rng.randrange(97) for _ in range(rng.choice([0, 1, 3]))]
        return [*known[: rng.choice([length, len(known), len(known)])], *tail][:longest]

    def _selection(self, like: Client | None) -> list[tuple[int, float]]:
        ids = sorted(self.loaded - self.unloaded)
        if like and {i for i, _ in like.message.lora} <= set(ids) and self.rng.random() < 0.7:
            return like.message.lora
        kind = self.rng.random()
        if not ids or kind < 0.25:
            return []
        if kind < 0.25 + self.world.mix_rate and len(ids) > 1:
            return [(adapter_id, self.rng.choice([0.5, 1.0])) for adapter_id in self.rng.sample(ids, 2)]
        return [(ids[min(int(self.rng.expovariate(3 / len(ids))), len(ids) - 1)], 1.0)]

    # ------------------------------------------------------------------------------------------------- what happens

    def run(self) -> Simulation:
        for adapter_id in range(1, self.world.adapters + 1):
            self._load(adapter_id)
        bound = 200 * self.world.requests + 20 * self.world.adapters
        loads = 3 * (self.world.requests + self.world.adapters)
        while len(self.clients) < self.world.requests or self.open or self.runner.queue or self.runner.events:
            self._happen()
            assert self.runner.loads <= loads, f"{self.runner.loads} loads: they chase one another"
            assert self.steps < bound, f"{self.steps} steps and no end"
        self._last_words()
        return self

    def _happen(self) -> None:
        """One thing of those that can happen now."""
        rng, world = self.rng, self.world
        things = []
        if len(self.clients) < world.requests:
            things.append((1.0, self._submit))
        if self.runner.queue:
            things.append((world.step_rate * 4, self._end_step))
        if self.runner.events:
            things.append((0.3, self._deliver))
        assert things, f"stalled with requests {sorted(self.open)}"
        if self.dead:
            things.append((0.1, self._late_word))
        if world.file_rate:
            things.append((world.file_rate, self._files))
        if self.open:
            things.append((world.abort_rate, self._abort))
        if world.adapters:
            things.append((world.churn_rate, self._churn))
        if self.resets < 5:
            things.append((world.reset_rate, self._reset))
        weights = [weight for weight, _ in things]
        rng.choices(things, weights)[0][1]()

    def _send(self, message: ToScheduler) -> None:
        self._take(self.core.handle(message, float(self.calls)))
        self._check()
        while (step := self.core.plan(float(self.calls))) is not None:
            self._take(self.core.take())
            self._check()
            self.steps += 1
            self.runner.accept(step)
            assert len(self.runner.queue) <= self.world.window
        self._take(self.core.take())

    def _check(self) -> None:
        self.calls += 1
        if self.calls % self.world.check_every == 0:
            self.core.check()

    def _take(self, messages: list[object]) -> None:
        for message in messages:
            if isinstance(message, Progress):
                ids = [update.request_id for update in message.updates]
                assert len(message.updates) > 0
                for update in message.updates:
                    self.clients[update.request_id].take(update)
                self.open -= {i for i in ids if self.clients[i].ended}
            elif isinstance(message, AdapterState):
                self.states[message.adapter_id] = message
                if message.state == "gone":
                    self.gone.append(message.adapter_id)
            elif isinstance(message, LoadAdapter | UnloadAdapter | EvictAdapter | Step):
                self.runner.accept(message)
            else:
                assert isinstance(message, Capacity), f"nobody reads {message}"

    def _submit(self) -> None:
        request_id = len(self.clients) + 1
        message = self._generate(request_id)
        self.clients[request_id] = Client(message, list(message.generated))
        self.open.add(request_id)
        self._send(message)

    def _end_step(self) -> None:
        self._send(self.runner.finish())

    def _deliver(self) -> None:
        self._send(self.runner.deliver(self.rng.randrange(len(self.runner.events))))

    def _abort(self) -> None:
        request_id = self.rng.choice(sorted(self.open))
        self.clients[request_id].aborted = True
        self._send(Abort(0, request_id))
        assert self.clients[request_id].ended

    def _load(self, adapter_id: int) -> None:
        self.loaded.add(adapter_id)
        preload = self.rng.random() < self.world.preload_rate
        self._send(LoadAdapter(adapter_id=adapter_id, path=f"adapters/{adapter_id}", preload=preload))

    def _churn(self) -> None:
        adapter_id = self.rng.randrange(1, self.world.adapters + 1)
        what = self.rng.random()
        if what < 0.4:
            self._send(PinAdapter(adapter_id, self.rng.random() < 0.3))
        elif what < 0.6:
            if adapter_id not in self.unloaded:
                self._load(adapter_id)
        elif adapter_id not in self.unloaded:
            self.unloaded.add(adapter_id)
            self._send(UnloadAdapter(adapter_id))

    def _reset(self) -> None:
        """The runner dies; another one comes."""
        self.resets += 1
        self.dead.append(self.runner)
        self.runner = FakeRunner(self.capacity, self.library, self.runner.epoch + 1, max_host=self.world.max_loaded)
        self._send(RunnerReady(epoch=self.runner.epoch, capacity=self.capacity))

    def _late_word(self) -> None:
        """What a dead runner had sent comes now."""
        if self.dead[0].events:
            self._send(self.dead[0].events.pop(0))
        else:
            self.dead.pop(0)

    def _files(self) -> None:
        number = self.rng.randrange(1, self.world.adapters + 1)
        bad = self.rng.choice([self.library.fails_to_load, self.library.changed])
        if number in bad:
            bad.discard(number)
        else:
            bad.add(number)
            self.doubtful.add(self.library.content(number))

    # -------------------------------------------------------------------------------------------------- the verdict

    def _last_words(self) -> None:
        self.core.check()
        stats = self.core.stats()
        assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)
        assert self.runner.widest <= self.world.max_loras
        for client in self.clients.values():
            self._judge(client)
        assert sorted(self.gone) == sorted(self.unloaded), "gone is told once"
        for adapter_id in self.unloaded:
            assert self.states[adapter_id].state == "gone"
        self._last_states(stats)

    def _last_states(self, stats: Stats) -> None:
        """What was told last of each adapter is where it is, and twins are in the same place."""
        living = [state for state in self.states.values() if state.state != "gone"]
        assert {s.adapter_id for s in living if s.state == "resident"} == set(stats.resident)
        revisions: dict[str, set[str]] = {}
        for state in living:
            assert state.state in ("host", "resident", "disk", "failed"), state
            if state.state != "failed":
                assert state.revision == self.library.revision(self.library.content(state.adapter_id))
                revisions.setdefault(state.revision, set()).add(state.state)
        assert all(len(places) == 1 for places in revisions.values()), revisions
        if self.world.max_loaded is not None:
            assert stats.host_adapters <= self.world.max_loaded
        if self.world.host_bytes is not None and not self.world.churn_rate:
            assert stats.host_bytes <= self.world.host_bytes

    def _judge(self, client: Client) -> None:
        message = client.message
        if client.error is not None:
            self._judge_error(client)
            return
        tokens, finish, matched = oracle(message, self.library, self.capacity)
        if client.aborted and client.finish == "abort":
            assert client.tokens == tokens[: len(client.tokens)]
            return
        assert (client.tokens, client.finish, client.matched) == (tokens, finish, matched), message.request_id
        if message.sampling.prompt_logprobs >= 0 and len(tokens) > len(message.generated):
            assert client.scores == list(range(len(message.prompt) - 1)), "every position is scored once"

    def _judge_error(self, client: Client) -> None:
        ids = {self.library.content(adapter_id) for adapter_id, _ in client.message.lora}
        error = client.error or ""
        if "cannot be" in error:
            assert ids & self.doubtful, error
        elif "--max-loaded-loras" in error or "--lora-host-memory" in error:
            assert self.world.max_loaded or self.world.host_bytes
        elif "rank pages" in error:
            assert self._too_large(ids) or self.world.churn_rate, error  # or the pinned ones leave no room
        elif "LoRA is not enabled" in error:
            assert ids
            assert not self.world.max_loras
        else:
            assert "tokens, but at most" in error, error
            assert len(client.message.prompt) >= min(self.world.max_length, self.world.kv_pages * self.world.page_size)

    def _too_large(self, ids: set[int]) -> bool:
        need: dict[str, int] = {}
        for adapter_id in ids:
            for group, count in self.library.footprints[adapter_id].pages.items():
                need[group] = need.get(group, 0) + count
        return any(count > min(4, self.world.pool.get(group, 0)) for group, count in need.items())


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_memory_is_tight(seed: int, window: int) -> None:
    """Few pages: rows give way all the time, and come back with their tokens."""
    pool, heavy = {"qkv": 6, "down": 6}, {"scored_rate": 0.6, "endless_rate": 0.8, "prompt": 16}
    world = World(seed, window, adapters=3, rows=8, kv_pages=24, budget=8, pool=pool, step_rate=0.15, **heavy)
    sim = Simulation(world).run()
    assert sim.core.stats().preemptions >= 5


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_many_adapters_few_lanes(seed: int, window: int) -> None:
    """More adapters than the pool holds: fills, evictions and mixes while others decode."""
    sim = Simulation(World(100 + seed, window, requests=50, adapters=12, kv_pages=30, rows=8, step_rate=0.3)).run()
    stats = sim.core.stats()
    assert stats.adapter_evictions > 0
    assert stats.adapter_fills > 12
    assert sim.runner.widest == 2


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_lanes_make_way(seed: int, window: int) -> None:
    """A bound of a few steps: lanes drain and are taken all the time, and nothing that a request said is lost."""
    rates = {"mix_rate": 0.2, "preload_rate": 0.2, "abort_rate": 0.05, "endless_rate": 0.6}
    world = World(700 + seed, window, requests=50, adapters=10, rows=8, kv_pages=60, max_wait=8.0, **rates)
    assert Simulation(world).run().core.stats().lane_preemptions > 3


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_everything_goes_wrong(seed: int, window: int) -> None:
    """Aborts, unloads, pins, adapters that fail, runners that die."""
    faults = {"abort_rate": 0.2, "reset_rate": 0.02, "churn_rate": 0.1, "faulty_rate": 0.3, "mix_rate": 0.3}
    waits = 20.0 if seed % 2 else 1e6
    world = World(200 + seed, window, requests=60, adapters=8, max_loras=3, step_rate=0.7, max_wait=waits, **faults)
    Simulation(world).run()


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_prompts_that_begin_alike(seed: int, window: int) -> None:
    """Conversations that go on, for two tenants and several adapters, some of equal bytes; in many pages or too few."""
    faults = {"abort_rate": 0.1, "reset_rate": 0.01, "churn_rate": 0.1, "twin_rate": 0.4} if seed % 2 else {}
    pages = 200 if seed % 4 < 2 else 24
    alike = {"share_rate": 0.8, "tenants": 2, **faults}
    world = World(600 + seed, window, adapters=4, kv_pages=pages, rows=8, budget=16, **alike)
    stats = Simulation(world).run().core.stats()
    assert stats.cached_tokens > 0
    assert pages > 24 or stats.kv_evictions > 0


@pytest.mark.parametrize("window", [1, 2, 3])
def test_nothing_is_shared_without_the_cache(window: int) -> None:
    """And no page outlives its request."""
    sim = Simulation(World(650, window, adapters=2, rows=8, share_rate=0.8, prefix_cache=False)).run()
    stats = sim.core.stats()
    assert (sim.runner.tokens_shared, stats.cached_tokens, stats.kv_pages_cached) == (0, 0, 0)


@pytest.mark.parametrize("window", [1, 2])
def test_thousands_of_adapters(window: int) -> None:
    """2,000 adapters through a pool of a few dozen, eight lanes."""
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
def test_a_small_host_tier(seed: int, window: int) -> None:
    """Fewer places on the host than adapters, and few bytes: loads, evictions and fills all the time."""
    tier: dict[str, Any] = {"max_loaded": 3 + seed % 3} if seed % 2 else {"host_bytes": 900}
    policy: Policy = "fifo" if seed % 4 > 1 else "lru"
    world = World(300 + seed, window, requests=60, adapters=14, rows=8, kv_pages=30, policy=policy, **tier)
    stats = Simulation(world).run().core.stats()
    assert stats.adapter_loads > 14
    assert stats.host_evictions > 10


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_twins_share_one_copy(seed: int, window: int) -> None:
    """Half of the adapters have the bytes of another; names come and go."""
    tier: dict[str, Any] = {"max_loaded": 5} if seed % 2 else {}
    rates = {"twin_rate": 0.5, "mix_rate": 0.4, "churn_rate": 0.05 * (seed % 3), "preload_rate": 0.3}
    world = World(400 + seed, window, requests=60, adapters=14, rows=8, kv_pages=30, max_loras=3, **rates, **tier)
    Simulation(world).run()


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(14))
def test_everything_goes_wrong_in_a_small_tier(seed: int, window: int) -> None:
    """Files that vanish, change and come back, twins, pins, preloads, unloads, aborts, runners that die."""
    faults = {"abort_rate": 0.1, "reset_rate": 0.02, "churn_rate": 0.15, "faulty_rate": 0.1, "file_rate": 0.1}
    tier: dict[str, Any] = [{"max_loaded": 4}, {"host_bytes": 1000}, {"max_loaded": 6, "host_bytes": 900}][seed % 3]
    rates = faults | {"twin_rate": 0.3, "mix_rate": 0.3, "preload_rate": 0.2}
    policy: Policy = "fifo" if seed % 2 else "lru"
    world = World(500 + seed, window, requests=70, adapters=12, max_loras=3, policy=policy, **rates, **tier)
    Simulation(world).run()


@pytest.mark.parametrize("window", [1, 2])
def test_thousands_of_adapters_in_a_small_tier(window: int) -> None:
    """3,000 adapters, a third of them twins, through a host tier of 50."""
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


def test_nothing_is_left_in_cycles() -> None:
    """The process runs without the collector of cycles."""
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


def test_the_same_seed_gives_the_same_run() -> None:
    """Nothing in the core depends on chance, time or the order of a set."""
    one, two = (Simulation(World(3, 2, abort_rate=0.1)).run() for _ in range(2))
    assert one.steps == two.steps
    assert one.runner.tokens_computed == two.runner.tokens_computed
