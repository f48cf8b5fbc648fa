"""scheduler.requests.fairness: a flood delays only its own account, weights count, idle accounts gain no credit."""

from __future__ import annotations

import random
from heapq import heappop, heappush

import pytest
from fixtures.scheduling.by_hand import generate
from fixtures.scheduling.small_world import profile_with
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import Generate, Sampling, Stopping
from scheduler.requests.fairness import ANSWER_COST, PROMPT_COST, FairShares
from scheduler.requests.request import Request, from_message
from scheduler.simulate.experiment import Experiment, Setup
from scheduler.simulate.trace import TraceRequest
from scheduler.simulate.workload import Workload
from scheduler.types import Order

ANSWER = 16


class Queue:
    """A simulated server that serves one request at a time, the first by order."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.fair = FairShares(weights)
        self.heap: list[tuple[Order, int, Request]] = []
        self.served: dict[str, float] = {}
        self.count = 0

    def ask(self, tenant: str, prompt: int, most: int = ANSWER, salt: str | None = None) -> Request:
        self.count += 1
        message = Generate(
            epoch=0,
            request_id=self.count,
            prompt=[1] * prompt,
            sampling=Sampling(),
            stopping=Stopping(most),
            cache_salt=tenant if salt is None else salt,
            tenant=tenant,
        )
        request = from_message(message, (), self.fair.order_on_arrival(message, self.count))
        heappush(self.heap, (request.order, self.count, request))
        return request

    def serve(self, answer: int = ANSWER) -> str:
        _, _, request = heappop(self.heap)
        request.admitted = True
        self.fair.on_admitted(request)
        request.tokens += [1] * answer
        cost = PROMPT_COST * request.prompt_length + ANSWER_COST * answer
        self.served[request.cache_salt] = self.served.get(request.cache_salt, 0.0) + cost
        self.fair.on_end(request)
        return request.cache_salt

    def waiting(self, tenant: str) -> int:
        return sum(request.cache_salt == tenant for _, _, request in self.heap)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 200)), min_size=2, max_size=120), st.integers(1, 4))
def test_two_backlogged_tenants_get_equal_service(asked: list[tuple[str, int]], weight: int) -> None:
    """While both accounts have requests waiting, their service differs by at most one request of each."""
    queue = Queue({"a": float(weight)})
    for tenant, prompt in asked:
        queue.ask(tenant, prompt)
    queue.served = {"a": 0.0, "b": 0.0}
    most = {t: max((p for name, p in asked if name == t), default=0) + ANSWER_COST * ANSWER for t in "ab"}
    while queue.waiting("a") and queue.waiting("b"):
        queue.serve()
        apart = abs(queue.served["a"] / weight - queue.served["b"])
        assert apart <= most["a"] / weight + most["b"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 99), st.booleans()), min_size=1, max_size=150))
def test_requests_of_one_tenant_keep_their_order(events: list[tuple[str, int, bool]]) -> None:
    """The order holds also when outputs are much shorter or longer than expected, which moves the accounts a lot."""
    queue, came, went = Queue(), dict[str, list[int]](), dict[str, list[int]]()
    for tenant, prompt, serve in events:
        came.setdefault(tenant, []).append(queue.ask(tenant, prompt, most=500).id)
        if serve:
            first = queue.heap[0][2]
            went.setdefault(first.cache_salt, []).append(first.id)
            queue.serve(answer=prompt * 5)
    for tenant, ids in went.items():
        assert ids == came[tenant][: len(ids)]


def test_returning_tenant_has_no_credit_and_no_debt() -> None:
    queue = Queue()
    for _ in range(50):
        queue.ask("flood", 100)
    for _ in range(20):
        queue.serve()
    queue.ask("late", 100)
    queue.ask("late", 100)
    assert [queue.serve() for _ in range(4)].count("late") == 2


def test_idle_server_forgets_the_accounts() -> None:
    queue = Queue()
    for _ in range(20):
        queue.ask("a", 100)
    while queue.heap:
        queue.serve()
    first = queue.ask("a", 100)
    second = queue.ask("b", 100)
    assert first.order[:3] == second.order[:3]
    assert queue.fair.account_count == 2


def test_a_tenant_with_many_salts_has_one_account() -> None:
    queue = Queue()
    for number in range(20):
        queue.ask("a", 100, salt=f"salt {number}")
    assert queue.fair.account_count == 1


def test_wrong_expectation_is_corrected_at_the_end() -> None:
    """Tenant a may generate 500 tokens but generates 4, b may and does generate 16: in the end service is equal."""
    queue, rng = Queue(), random.Random(0)
    for _ in range(400):
        for tenant, most in (("a", 500), ("b", 16)):
            if queue.waiting(tenant) < 5:
                queue.ask(tenant, rng.randint(20, 40), most)
        queue.serve(answer=4 if queue.heap[0][2].cache_salt == "a" else 16)
    assert queue.served["a"] / queue.served["b"] == pytest.approx(1.0, abs=0.1)


def test_new_tenants_do_not_starve_an_old_one() -> None:
    """New tenants with new accounts keep coming, one request each; the old tenant's third request is served anyway."""
    queue = Queue()
    last = [queue.ask("old", 100) for _ in range(3)][-1]
    for number in range(40):
        queue.ask(f"new{number}", 100)
        queue.serve()
    assert last.admitted


def test_transferred_bytes_are_charged_to_the_waiting_tenant() -> None:
    queue = Queue()
    first = queue.ask("a", 10)
    queue.fair.on_transfer(first, 100 << 20)
    assert queue.ask("a", 10).order[2] - first.order[2] == pytest.approx(10 + 2 * ANSWER + 100)


def test_accounts_without_requests_are_pruned() -> None:
    queue = Queue()
    queue.ask("stays", 5000)
    for number in range(3000):
        queue.ask(f"t{number}", 1)
        queue.serve()
    assert queue.fair.account_count < 1100


def test_requests_without_a_tenant_share_by_adapter() -> None:
    fair = FairShares()
    orders = [
        fair.order_on_arrival(replace_lora(generate(number), lora), number) for number, lora in enumerate([1, 1, 2], 1)
    ]
    assert orders[1][2] > orders[0][2] == orders[2][2]


def replace_lora(message: Generate, adapter_id: int) -> Generate:
    return Generate(
        epoch=0,
        request_id=message.request_id,
        prompt=message.prompt,
        lora=[(adapter_id, 1.0)],
        sampling=message.sampling,
        stopping=message.stopping,
    )


def two_tenants(flood: float) -> list[TraceRequest]:
    """Returns a trace: tenant quiet sends 4 requests/s for 20 adapters, tenant flood sends `flood`/s for 5 others."""
    quiet = Workload(adapters=20, rate=4.0, requests=120, prompt=(20, 60), output=(10, 40), seed=1).generate()
    named = [replace_ask(one, "quiet", f"q{one.adapter}") for one in quiet]
    if flood:
        loud = Workload(adapters=5, rate=flood, requests=int(30 * flood), prompt=(20, 60), output=(10, 40), seed=2)
        named += [replace_ask(one, "flood", f"f{one.adapter}") for one in loud.generate()]
    return sorted(named, key=lambda one: one.at)


def replace_ask(one: TraceRequest, tenant: str, adapter: str) -> TraceRequest:
    return TraceRequest(at=one.at, adapter=adapter, prompt=one.prompt, output=one.output, tenant=tenant)


def slowest(policy: str, requests: list[TraceRequest]) -> float:
    """Returns the p99 TTFT of the tenant quiet; asserts that all its requests were served."""
    setup = Setup(max_loras=8, pool=32, policy=policy, max_wait=1.0)
    _, log = Experiment(setup, profile_with(rows=8)).run(requests)
    times = sorted(t.ttft for t in log.timelines.values() if t.request.tenant == "quiet")
    assert len(times) == 120
    return times[int(0.99 * len(times))]


def test_flood_delays_only_its_own_requests() -> None:
    """The flood is three times the machine's capacity. It delays the quiet tenant under fcfs, but not under fair."""
    alone, both = two_tenants(0.0), two_tenants(40.0)
    calm, swamped, fair = slowest("fair", alone), slowest("fcfs", both), slowest("fair", both)
    assert swamped > 20 * calm
    assert fair < calm + 0.5  # it waits for one of eight rows; a request takes half a second


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_core_passes_its_audits_under_the_fair_policy(seed: int, window: int) -> None:
    """Few pages, few lanes and several tenants cause preemptions and fills; the core is audited after each call."""
    workload = Workload(adapters=12, rate=50.0, requests=120, prompt=(4, 60), output=(2, 30), tenants=3, seed=seed)
    setup = Setup(max_loras=2, pool=4, window=window, policy="fair", max_wait=0.2, audit=True)
    summary, _ = Experiment(setup, profile_with(rows=8, kv_tokens=320)).run(workload.generate())
    assert summary["failed"] == 0
    assert summary["preemptions"] > 0
