"""The fair policy: requests of the account that used least go first. Does not depend on rows, pages or lanes.

Each tenant has an account of virtual tokens; requests without a tenant use the account of their adapter selection. A
request costs its prompt tokens once, its generated tokens twice, and one per MiB of adapter transferred for it, all
divided by the account's weight. A request's order is the value of its account on arrival. The account is then charged
for the expected cost, and corrected by the difference to the real cost when the request ends.

    account of A   |==a1==|==a2==|==a3==|==a4==| ...        A floods: its requests lie far apart and far ahead
    account of B          .      |=b1=|                     B comes late: its account is raised to the clock, no credit
    clock          -------------> the value that an account with requests always waiting would have: the work done,
                                  divided by the sum of the weights of the accounts with live requests, and at least the
                                  order of the latest admitted request

The token costs and the raise of an idle account to the clock follow "Fairness in Serving Large Language Models"
(arXiv 2401.00588). Orders are fixed on arrival as in start-time fair queueing, so the queue stays sorted and a step
only looks at its heads. While two accounts have requests waiting, their service differs by at most one request of each,
plus the errors of the expected costs. The clock advances with all work, so new requests cannot overtake a waiting
request forever.
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
FIRST_EXPECTED = 256  # expected generated tokens until the first request of the account ends
LATEST_WEIGHT = 0.2  # weight of the latest request in the moving average of generated tokens

AccountName = str | tuple[tuple[int, float], ...]
"""A tenant, or an adapter selection."""


@dataclass(slots=True)
class _Account:
    """The virtual tokens of one tenant or adapter selection."""

    weight: float
    expected: float  # moving average of the generated tokens per request
    used: float = 0.0  # the order of its next request
    last: float = 0.0  # the order of its latest request
    live: int = 0  # requests that have not ended
    waiting: int = 0  # live requests that were never admitted


@dataclass(slots=True)
class _Charge:
    """The charge for one request on arrival: its account and the charged tokens, before division by the weight."""

    account: AccountName
    tokens: float
    waiting: bool = True  # the request was never admitted


class FairShares(Ordering):
    """Orders requests by virtual tokens: (-is_suspect, priority, account value, arrival).

    `weights` is by tenant; a tenant without a weight, or an adapter selection, has weight 1.
    """

    length = 4

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._accounts: dict[AccountName, _Account] = {}
        self._charges: dict[int, _Charge] = {}  # by request id
        self._clock = 0.0
        self._live_weight = 0.0  # sum of the weights of the accounts with live requests
        self._prune_at = 1024

    @property
    def account_count(self) -> int:
        """The number of accounts in memory."""
        return len(self._accounts)

    def order_on_arrival(self, message: Generate, arrival: int) -> Order:
        """Returns the order of a request that arrives now, and charges its account with the expected cost."""
        name: AccountName = message.tenant or tuple(message.lora)
        account = self._account(name)
        self._live_weight += 0.0 if account.live else account.weight
        start = account.used if account.waiting else max(account.used, self._clock)
        account.live += 1
        account.waiting += 1
        account.last = order = max(start, account.last)  # not before older requests of the account
        answer = min(message.stopping.max_tokens, account.expected)
        tokens = PROMPT_COST * len(message.prompt) + ANSWER_COST * max(answer, len(message.generated))
        account.used = start + tokens / account.weight
        self._charges[message.request_id] = _Charge(name, tokens)
        return 0, message.priority, order, arrival

    def order_without_request(self, arrival: int, priority: int = 0) -> Order:
        """Returns the order that the first request of a new account would get now."""
        return 0, priority, self._clock, arrival

    def on_admitted(self, request: Request) -> None:
        """Advances the clock to at least the order of the admitted request."""
        self._clock = max(self._clock, request.order[2])
        self._mark_admitted(self._charges[request.id])

    def on_transfer(self, request: Request, size: int) -> None:
        """Charges the account of the request for a transfer of `size` bytes that it waits for."""
        account = self._accounts[self._charges[request.id].account]
        account.used += TRANSFER_COST * size / account.weight

    def on_end(self, request: Request) -> None:
        """Replaces the expected cost by the real one, which is 0 for a request that was never admitted."""
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
            self._accounts.clear()  # the server is idle: accounts are not charged for capacity that was free
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
        """Removes accounts behind the clock that have no live request: a new account would start at the same value."""
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.live or account.used > self._clock or account.last > self._clock
        }
        self._prune_at = max(1024, 2 * len(self._accounts))


def make_ordering(policy: str, weights: Mapping[str, float] | None = None) -> Ordering:
    """Returns the ordering of a policy. fcfs and priority get the same one; they differ only in the HTTP server."""
    return FairShares(weights) if policy == "fair" else Ordering()
