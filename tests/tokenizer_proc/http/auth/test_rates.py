"""Rates: what a key is granted in a minute and in the long run, whatever its calls are."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer_proc.http.auth.rates import WINDOW, Charge, Rate

LIMIT = 100


class Calls:
    """Calls at one rate on a fake clock. `granted` has (time, tokens that count) of every take, settled or not."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.now = 0.0
        self.rate = Rate(limit, lambda: self.now)
        self.open: list[Charge] = []
        self.grants: list[tuple[Charge, float, list[float]]] = []  # charge, time, [amount that counts]

    def take(self, amount: float, charge: Charge | None = None) -> Charge | None:
        """Takes `amount` for a new call or more for an open one, if that is allowed. Returns the charge."""
        own = charge or Charge()
        if not self.rate.fits(own.amount + amount) or self.rate.wait(own) > 0:
            return None
        self.rate.take(amount, own)
        self.grants.append((own, self.now, [amount]))
        if charge is None:
            self.open.append(own)
        return own

    def settle(self, charge: Charge, used: float) -> None:
        back = max(0.0, charge.amount - used)
        for own, _, amount in reversed(self.grants):
            if own is charge:
                part = min(back, amount[0])
                amount[0] -= part
                back -= part
        self.open.remove(charge)
        self.rate.settle(charge, used)

    def most_in_a_window(self) -> float:
        starts = [time for _, time, _ in self.grants]
        return max(
            (sum(a[0] for _, t, a in self.grants if start <= t < start + WINDOW) for start in starts), default=0.0
        )


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.1, 1.0, 7.0, 59.9, 60.0, 100.0])),
        st.tuples(st.just("take"), st.integers(1, LIMIT)),
        st.tuples(st.just("more"), st.integers(1, LIMIT)),
        st.tuples(st.just("settle"), st.floats(0, 1)),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_a_minute_holds_the_limit_and_one_call_more(steps: list[tuple[str, float]]) -> None:
    calls = Calls()
    largest = 0.0
    for turn, (what, value) in enumerate(steps):
        some = calls.open[turn % len(calls.open)] if calls.open else None
        if what == "wait":
            calls.now += value
        elif what == "take":
            calls.take(value)
        elif what == "more" and some is not None:
            calls.take(value, some)
        elif what == "settle" and some is not None:
            calls.settle(some, some.amount * value)
        largest = max([largest, *(charge.amount for charge in calls.open)])
        assert calls.most_in_a_window() <= LIMIT + largest
        assert 0 <= calls.rate.wait() <= WINDOW


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=40))
def test_a_refused_call_is_let_in_after_its_wait(amounts: list[int]) -> None:
    """Also while nothing is settled: calls that go on for ever do not starve the next one."""
    calls = Calls()
    for amount in amounts:
        wait = calls.rate.wait()
        assert wait <= WINDOW
        calls.now += wait
        assert calls.take(amount) is not None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, LIMIT), min_size=20, max_size=60))
def test_the_long_run_holds_the_limit(amounts: list[int]) -> None:
    calls = Calls()
    for amount in amounts:
        calls.now += calls.rate.wait()
        calls.take(amount)
    assert sum(amounts) <= LIMIT * (calls.now / WINDOW + 2)


def test_parallel_calls_are_charged_at_the_door() -> None:
    calls = Calls(10)
    admitted = [calls.take(5) for _ in range(200)]
    assert sum(charge is not None for charge in admitted) == 2
    assert calls.rate.wait() == WINDOW


def test_what_a_call_did_not_use_is_given_back() -> None:
    calls = Calls()
    first = calls.take(LIMIT)
    assert first is not None
    assert calls.take(1) is None
    calls.settle(first, 3)
    assert calls.rate.left == LIMIT - 3
    assert calls.take(LIMIT) is not None


def test_a_call_may_take_more_while_others_left_something() -> None:
    calls = Calls()
    first, second = calls.take(60), calls.take(20)
    assert first is not None
    assert second is not None
    assert calls.take(40, first) is first  # the others have 20 of the limit
    assert calls.take(1, second) is None  # the others have all of it
    assert calls.take(1, first) is None  # more than the limit for one call


def test_without_a_limit_everything_is_let_in() -> None:
    rate = Rate(None)
    charge = Charge()
    rate.take(1e12, charge)
    assert rate.fits(1e15)
    assert rate.wait() == 0
    rate.settle(charge, 5)
