"""The memory budget: what an owner may hold beside others, and accounts that change in size."""

from __future__ import annotations

import random

import pytest

from engine.errors import Overloaded
from tokenizer_proc.http.intake.memory_budget import BodyTooLarge, MemoryAccount, MemoryBudget


def fill(budget: MemoryBudget, *owners: str, step: int = 1) -> None:
    """Lets the owners take in turn until none can take more."""
    wanting = list(owners)
    while wanting:
        for owner in list(wanting):
            try:
                budget.take(owner, step)
            except Overloaded:
                wanting.remove(owner)


def test_an_owner_alone_gets_two_thirds() -> None:
    budget = MemoryBudget(900)
    fill(budget, "a")
    assert budget.held_by("a") == budget.most == 600


def test_owners_that_want_all_get_equal_shares() -> None:
    for count in (2, 3, 10):
        budget, owners = MemoryBudget(10_000), [str(n) for n in range(count)]
        fill(budget, *owners)
        assert {budget.held_by(owner) for owner in owners} <= {20_000 // (1 + 2 * count) + n for n in (-2, -1, 0, 1)}
        assert budget.used < 10_000


def test_an_owner_that_comes_late_finds_room() -> None:
    budget = MemoryBudget(900)
    fill(budget, "a")
    fill(budget, "b")
    assert budget.held_by("b") == 200
    with pytest.raises(Overloaded, match="max-request-memory"):
        budget.take("a", 1)
    budget.give("a", 300)
    fill(budget, "b")
    assert budget.held_by("b") > 350


def test_accounts_free_what_they_hold() -> None:
    budget, rng = MemoryBudget(100_000), random.Random(1)
    accounts = [MemoryAccount(budget, rng.choice("abc")) for _ in range(20)]
    for _ in range(3000):
        account, part, size = rng.choice(accounts), rng.choice("xy"), rng.randrange(9000)
        before = account.held
        try:
            (account.add if rng.random() < 0.2 else account.set)(part, size)
        except (Overloaded, BodyTooLarge):
            assert account.held == before
        if rng.random() < 0.05:
            account.close()
        assert budget.used == sum(one.held for one in accounts) <= budget.total
    for account in accounts:
        account.close()
        account.close()
    assert budget.used == 0
    assert not any(budget.held_by(owner) for owner in "abc")


def test_an_owner_of_nothing_is_forgotten() -> None:
    budget = MemoryBudget(900)
    for owner in "abc":
        account = MemoryAccount(budget, owner)
        account.add("x", 0)
        account.close()
    assert not budget._by_owner


def test_what_could_never_fit_is_told_apart() -> None:
    account = MemoryAccount(MemoryBudget(9 << 20), "a")
    account.add("x", 3 << 20)
    with pytest.raises(BodyTooLarge, match="6 MiB"):
        account.add("y", 4 << 20)
    account.add("y", 3 << 20)
