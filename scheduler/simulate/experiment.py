"""One configuration against one trace: builds the fleet, runs it, says what happened. Knows nothing of flags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from scheduler.core import Scheduler
from scheduler.requests.policy import SchedulePolicy
from scheduler.simulate.baselines.plain import Plain
from scheduler.simulate.baselines.rules import Drain, Skip
from scheduler.simulate.baselines.shelf import Shelf
from scheduler.simulate.fleet import Fleet
from scheduler.simulate.machine import Machine, weigh
from scheduler.simulate.profile import Profile
from scheduler.simulate.replica import Core, Replica
from scheduler.simulate.results.journal import Journal
from scheduler.simulate.results.report import Summary, summarise
from scheduler.simulate.trace import Ask, hot_adapters, rescale
from scheduler.state import Bounds

RULES = ("chorus", "skip", "drain")


@dataclass(frozen=True)
class Setup:
    """What is compared: a rule on so many machines, with so many lanes and a pool for so many adapters.

    `drain_after`: seconds after which the drain rule calls an adapter starving. `warm`: adapters are read and filled
    before time begins, as far as there is room; else every one is read when it is first named. `max_wait` and `policy`
    are those of our own scheduler. `audit`: the books are proved after every call.
    """

    rule: str = "chorus"
    max_loras: int = 8
    pool: int = 8
    window: int = 1
    max_loaded: int | None = None
    replicas: int = 1
    router: str = "hash"
    warm: bool = True
    drain_after: float = 1.0
    max_wait: float = 5.0
    policy: SchedulePolicy = "fcfs"
    audit: bool = False

    @property
    def label(self) -> str:
        """Short, for a table."""
        rule = self.rule if self.policy == "fcfs" else f"{self.rule} {self.policy}"
        return f"{rule} {self.max_loras}/{self.pool}"


def _ignore(_count: int) -> None:
    return None


@dataclass(frozen=True)
class Experiment:
    """A setup with a profile; `tell` hears how many requests ended."""

    setup: Setup
    profile: Profile
    tell: Callable[[int], object] = _ignore

    def capacity(self, asks: Sequence[Ask], backlog: float = 2.0) -> float:
        """Requests a second at most: a closed loop with `backlog` requests in flight for each row."""
        fleet = self._fleet(asks)
        concurrency = max(1, int(backlog * self.profile.room.rows * self.setup.replicas))
        return fleet.run_closed(asks, min(concurrency, max(1, len(asks) // 3)))

    def run(self, asks: Sequence[Ask], hot: int | None = None, load: float | None = None) -> tuple[Summary, Journal]:
        """Every request at its time; with `load`, at that share of what the machines can do at most."""
        most = self.capacity(asks) if load is not None else None
        if most is not None and load is not None:
            asks = rescale(asks, load * most)
        fleet = self._fleet(asks)
        fleet.run_open(asks)
        for replica in fleet.replicas:
            replica.core.check()
            assert replica.open == 0, f"replica {replica.number} has {replica.open} requests left"
        stats = [replica.core.stats() for replica in fleet.replicas]
        summary = summarise(fleet.journal, hot_adapters(asks, hot), stats, fleet.now)
        busy = sum(replica.machine.busy for replica in fleet.replicas) / (fleet.now * len(fleet.replicas))
        steps = max(1, summary["steps"])
        filled = {
            "busy": busy,
            "rows": sum(replica.machine.rows for replica in fleet.replicas) / steps,
            "lanes": sum(replica.machine.lanes for replica in fleet.replicas) / steps,
        }
        return {"capacity": most, **summary, **filled}, fleet.journal

    def _fleet(self, asks: Sequence[Ask]) -> Fleet:
        popular = Counter(ask.adapter for ask in asks if ask.adapter is not None)
        names = [name for name, _ in reversed(popular.most_common())]
        ids = {name: number for number, name in enumerate(names, 1)}
        weights = {number: weigh(self.profile, name) for name, number in ids.items()}
        journal = Journal()
        replicas = [
            Replica(number, self._core(), Machine(self.profile, weights), journal, ids, self.setup.audit)
            for number in range(self.setup.replicas)
        ]
        fleet = Fleet(replicas, self.setup.router, journal, self.tell)
        if self.setup.warm:
            fleet.warm_up(names)
        return fleet

    def _core(self) -> Core:
        setup = self.setup
        capacity = self.profile.capacity(max_loras=setup.max_loras, pool_adapters=setup.pool)
        if setup.rule == "chorus":
            return Scheduler(capacity, bounds(setup), setup.window)
        rule = Drain(setup.drain_after) if setup.rule == "drain" else Skip()
        return Plain(Shelf(replace(capacity), setup.max_loaded), rule, setup.window)


def bounds(setup: Setup) -> Bounds:
    """What our own scheduler's flags would say."""
    return Bounds(
        max_loras=setup.max_loras,
        max_loaded_loras=setup.max_loaded,
        lora_max_wait=setup.max_wait,
        schedule_policy=setup.policy,
    )
