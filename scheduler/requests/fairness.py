"""The fair policy: the account that used less goes first. Knows nothing of rows, pages or lanes.

Each tenant (without one: each adapter selection) has an account of virtual tokens: its prompt tokens once, generated
ones twice, and one per MiB of adapter transferred for it, all divided by its weight. A request's order is its account's
value on arrival, and the account is then charged for the expected cost; the difference is corrected when it ends.

    account of A   |==a1==|==a2==|==a3==|==a4==| ...        A floods: its requests lie far apart and far ahead
    account of B          .      |=b1=|                     B comes late: its account is raised to the clock, no credit
    clock          -------------> an account that always has requests waiting would be here: the work done, divided by
                                  the weights present, and at least the order of the latest admitted request

After "Fairness in Serving Large Language Models" (2401.00588: token costs, lift on return) with orders fixed on arrival
as in start-time fair queueing, so that the queue stays sorted and a step only looks at its heads. While two accounts
have requests waiting, their service differs by at most a request of each, and the errors of the expected costs. The
clock advances with all work, so each waiting request is at last before all new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.messages import Generate
from scheduler.requests.policy import Ordering
from scheduler.requests.request import Request
from scheduler.types import Order

PROMPT_COST = 1.0
ANSWER_COST = 2.0
TRANSFER_COST = 1 / (1 << 20)
FIRST_EXPECTED = 256  # generated tokens, before any request of the account ended
LATEST_WEIGHT = 0.2  # of the latest answer in the moving average

AccountName = str | tuple[tuple[int, float], ...]
"""A tenant's cache_salt, or an adapter selection."""


@dataclass(slots=True)
class _Account:
    """The virtual tokens of one tenant or adapter selection."""

    weight: float
    expected: float  # generated tokens of a request, a moving average
    used: float = 0.0  # the order of its next request
    last: float = 0.0  # the order of its latest request
    live: int = 0  # requests that have not ended
    waiting: int = 0  # those of them that were never admitted


@dataclass(slots=True)
class _Charge:
    """What a request's account was charged on arrival."""

    account: AccountName
    tokens: float
    waiting: bool = True  # never admitted


class FairShares(Ordering):
    """Orders by virtual tokens: (-is_suspect, priority, account, arrival). A tenant without a weight has weight 1."""

    length = 4

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._accounts: dict[AccountName, _Account] = {}
        self._charges: dict[int, _Charge] = {}  # by request
        self._clock = 0.0
        self._live_weight = 0.0  # of the accounts with live requests
        self._prune_at = 1024

    @property
    def account_count(self) -> int:
        """How many accounts are kept."""
        return len(self._accounts)

    def order_on_arrival(self, message: Generate, arrival: int) -> Order:
        """Charges the account with the request's expected cost."""
        name: AccountName = message.cache_salt or tuple(message.lora)
        account = self._account(name)
        self._live_weight += 0.0 if account.live else account.weight
        start = account.used if account.waiting else max(account.used, self._clock)
        account.live += 1
        account.waiting += 1
        account.last = order = max(start, account.last)  # never before an older request of the same account
        answer = min(message.stopping.max_tokens, account.expected)
        tokens = PROMPT_COST * len(message.prompt) + ANSWER_COST * max(answer, len(message.generated))
        account.used = start + tokens / account.weight
        self._charges[message.request_id] = _Charge(name, tokens)
        return 0, message.priority, order, arrival

    def order_without_request(self, arrival: int, priority: int = 0) -> Order:
        """The order that the first request of a new account would get now."""
        return 0, priority, self._clock, arrival

    def on_admitted(self, request: Request) -> None:
        """Advances the clock."""
        self._clock = max(self._clock, request.order[2])
        self._mark_admitted(self._charges[request.id])

    def on_transfer(self, request: Request, size: int) -> None:
        """Charges the account of the request that waits for the bytes."""
        account = self._accounts[self._charges[request.id].account]
        account.used += TRANSFER_COST * size / account.weight

    def on_end(self, request: Request) -> None:
        """Replaces the expected cost by the real one; a request that was never admitted costs nothing."""
        charge = self._charges.pop(request.id)
        self._mark_admitted(charge)
        account = self._accounts[charge.account]
        tokens = 0.0
        if request.admitted:
            tokens = PROMPT_COST * request.prompt_length + ANSWER_COST * request.generated
            account.expected += LATEST_WEIGHT * (request.generated - account.expected)
        account.used += (tokens - charge.tokens) / account.weight
        self._clock += tokens / self._live_weight
        account.live -= 1
        self._live_weight -= 0.0 if account.live else account.weight
        if not self._charges:
            self._accounts.clear()  # an idle server forgets: capacity that was free has not to be paid back
            self._clock = self._live_weight = 0.0

    def _mark_admitted(self, charge: _Charge) -> None:
        self._accounts[charge.account].waiting -= charge.waiting
        charge.waiting = False

    def _account(self, name: AccountName) -> _Account:
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= self._prune_at:
                self._prune()
            weight = self._weights.get(name, 1.0) if isinstance(name, str) else 1.0
            account = self._accounts[name] = _Account(weight, FIRST_EXPECTED)
        return account

    def _prune(self) -> None:
        """Removes accounts behind the clock that have no live request: a new one would be no different."""
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.live or account.used > self._clock or account.last > self._clock
        }
        self._prune_at = max(1024, 2 * len(self._accounts))


def make_ordering(policy: str, weights: Mapping[str, float] | None = None) -> Ordering:
    """The ordering of a policy. fcfs and priority differ only in what the HTTP server accepts."""
    return FairShares(weights) if policy == "fair" else Ordering()
