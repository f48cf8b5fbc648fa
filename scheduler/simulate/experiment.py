"""One configuration on one trace: builds the fleet, runs it and summarises the results. Knows no flags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from scheduler.core import Scheduler
from scheduler.requests.policy import SchedulePolicy
from scheduler.simulate.baselines.adapter_tiers import AdapterTiers
from scheduler.simulate.baselines.baseline import BaselineScheduler
from scheduler.simulate.baselines.rules import DrainStarving, SkipAhead
from scheduler.simulate.fleet import Fleet
from scheduler.simulate.machine import Machine, adapter_on_disk
from scheduler.simulate.profile import Profile
from scheduler.simulate.replica import Core, Replica
from scheduler.simulate.results.report import Summary, summarise
from scheduler.simulate.results.request_log import RequestLog
from scheduler.simulate.trace import TraceRequest, hot_adapters, rescale
from scheduler.state import Bounds

RULES = ("chorus", "skip", "drain")


@dataclass(frozen=True)
class Setup:
    """One configuration to compare."""

    rule: str = "chorus"  # one of RULES
    max_loras: int = 8  # lanes
    pool: int = 8  # adapters of the largest rank that the rank pages hold
    window: int = 1  # steps in flight
    max_loaded: int | None = None  # adapters on the host; None: no limit
    replicas: int = 1
    router: str = "hash"
    warm: bool = True  # load and fill adapters before time 0, as far as they fit; else when first requested
    drain_after: float = 1.0  # rule drain only: seconds after which an adapter starves
    max_wait: float = 5.0  # rule chorus only: --lora-max-wait, in seconds
    policy: SchedulePolicy = "fcfs"  # rule chorus only: --schedule-policy
    audit: bool = False  # run the core's audit after each call

    @property
    def label(self) -> str:
        """The heading of this configuration's column in the table."""
        rule = self.rule if self.policy == "fcfs" else f"{self.rule} {self.policy}"
        return f"{rule} {self.max_loras}/{self.pool}"


def _ignore(_count: int) -> None:
    return None


@dataclass(frozen=True)
class Experiment:
    """A setup on a machine profile. `on_finished` is called with how many requests have ended since the last call."""

    setup: Setup
    profile: Profile
    on_finished: Callable[[int], object] = _ignore

    def capacity(self, requests: Sequence[TraceRequest], backlog: float = 2.0) -> float:
        """Returns the most requests per second, measured in a closed loop with `backlog` open requests for each row."""
        fleet = self._fleet(requests)
        concurrency = max(1, int(backlog * self.profile.room.rows * self.setup.replicas))
        return fleet.run_closed(requests, min(concurrency, max(1, len(requests) // 3)))

    def run(
        self, requests: Sequence[TraceRequest], hot: int | None = None, load: float | None = None
    ) -> tuple[Summary, RequestLog]:
        """Sends each request at its time, or, with `load`, rescaled to this share of the capacity. Returns the results.

        `hot`: how many of the busiest adapters are the class "hot" in the report.
        """
        capacity = self.capacity(requests) if load is not None else None
        if capacity is not None and load is not None:
            requests = rescale(requests, load * capacity)
        fleet = self._fleet(requests)
        fleet.run_open(requests)
        for replica in fleet.replicas:
            replica.core.check()
            left = replica.open_requests
            assert left == 0, f"replica {replica.number} has {left} requests left"
        stats = [replica.core.stats() for replica in fleet.replicas]
        summary = summarise(fleet.log, hot_adapters(requests, hot), stats, fleet.now)
        busy = sum(replica.machine.busy for replica in fleet.replicas) / (fleet.now * len(fleet.replicas))
        steps = max(1, summary["steps"])
        per_step = {
            "busy": busy,
            "rows": sum(replica.machine.rows for replica in fleet.replicas) / steps,
            "lanes": sum(replica.machine.lanes for replica in fleet.replicas) / steps,
        }
        return {"capacity": capacity, **summary, **per_step}, fleet.log

    def _fleet(self, requests: Sequence[TraceRequest]) -> Fleet:
        popular = Counter(request.adapter for request in requests if request.adapter is not None)
        names = [name for name, _ in reversed(popular.most_common())]
        ids = {name: number for number, name in enumerate(names, 1)}
        on_disk = {number: adapter_on_disk(self.profile, name) for name, number in ids.items()}
        log = RequestLog()
        replicas = [
            Replica(number, self._core(), Machine(self.profile, on_disk), log, ids, self.setup.audit)
            for number in range(self.setup.replicas)
        ]
        fleet = Fleet(replicas, self.setup.router, log, self.on_finished)
        if self.setup.warm:
            fleet.warm_up(names)
        return fleet

    def _core(self) -> Core:
        setup = self.setup
        capacity = self.profile.capacity(max_loras=setup.max_loras, pool_adapters=setup.pool)
        if setup.rule == "chorus":
            return Scheduler(capacity, bounds(setup), setup.window)
        rule = DrainStarving(setup.drain_after) if setup.rule == "drain" else SkipAhead()
        return BaselineScheduler(AdapterTiers(replace(capacity), setup.max_loaded), rule, setup.window)


def bounds(setup: Setup) -> Bounds:
    """Returns the bounds that the scheduler process would get from the corresponding flags."""
    return Bounds(
        max_loras=setup.max_loras,
        max_loaded_loras=setup.max_loaded,
        lora_max_wait=setup.max_wait,
        schedule_policy=setup.policy,
    )
