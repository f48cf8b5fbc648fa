"""FairShares shares: whoever used less goes first. Knows nothing of rows, pages or lanes.

Everyone who asks (a tenant where one is named, else the adapter) has an account of virtual tokens: what was done for
it, prompt tokens once, generated ones twice, a MiB of adapter moved for one, all over its weight. A request's place is
its account at its arrival, which then pays in advance; what it really cost is settled when it ends.

    account of A   |==a1==|==a2==|==a3==|==a4==| ...        A floods: its requests lie far apart and far ahead
    account of B          .      |=b1=|                     B comes late: its account is lifted to the clock, no credit
    clock          -------------> as far as everyone would be who asked for all he could get: work done by those there,
                                  at least the place of the latest that was let in; what waits is served left to right

After "Fairness in Serving Large Language Models" (2401.00588: token costs, lift on return) with places fixed on arrival
as in start-time fair queueing, so that the queue stays sorted and a step looks at its heads only. While two accounts
have requests waiting, what they got differs by no more than a request of each, and what was mistaken in advance. The
clock goes on with all work, so whoever waits is at last before all who come.
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
MOVED_COST = 1 / (1 << 20)
FIRST_GUESS = 256  # tokens of an answer, before any was seen
NEWEST = 0.2  # weight of the latest answer in the expectation

Owner = str | tuple[tuple[int, float], ...]


@dataclass(slots=True)
class _Account:
    """`used` is where its next request goes, `last` where its latest went.

    `live` counts requests that did not end, `waiting` those of them that were never let in.
    """

    weight: float
    expected: float
    used: float = 0.0
    last: float = 0.0
    live: int = 0
    waiting: int = 0


@dataclass(slots=True)
class _Ticket:
    """Whose request it is, what it paid in advance, and whether it was never let in."""

    owner: Owner
    paid: float
    waits: bool = True


class FairShares(Ordering):
    """Places by virtual tokens. `weights` by tenant; 1 where none is given."""

    length = 3

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._accounts: dict[Owner, _Account] = {}
        self._tickets: dict[int, _Ticket] = {}  # by request
        self._clock = self._present = 0.0  # `_present`: the weights of accounts with live requests
        self._tidy_at = 1024

    def place(self, message: Generate, arrival: int) -> Order:
        """(priority, account, arrival); the account pays for what the request is likely to cost."""
        owner: Owner = message.cache_salt or tuple(message.lora)
        account = self._account(owner)
        self._present += 0.0 if account.live else account.weight
        base = account.used if account.waiting else max(account.used, self._clock)
        account.live += 1
        account.waiting += 1
        account.last = place = max(base, account.last)  # never before an older one of its own
        answer = min(message.stopping.max_tokens, account.expected)
        cost = PROMPT_COST * len(message.prompt) + ANSWER_COST * max(answer, len(message.generated))
        account.used = base + cost / account.weight
        self._tickets[message.request_id] = _Ticket(owner, cost)
        return message.priority, place, arrival

    def unasked(self, arrival: int, priority: int = 0) -> Order:
        """As if somebody new asked for it."""
        return priority, self._clock, arrival

    def admitted(self, request: Request) -> None:
        """The clock goes on."""
        self._clock = max(self._clock, request.order[1])
        self._in(self._tickets[request.id])

    def moved(self, request: Request, size: int) -> None:
        """Whoever waits for bytes pays for them."""
        account = self._accounts[self._tickets[request.id].owner]
        account.used += MOVED_COST * size / account.weight

    def left(self, request: Request) -> None:
        """What it really cost is settled: it paid for an expected answer."""
        ticket = self._tickets.pop(request.id)
        self._in(ticket)
        account = self._accounts[ticket.owner]
        cost = 0.0
        if request.admitted:
            cost = PROMPT_COST * request.prompt_length + ANSWER_COST * request.generated
            account.expected += NEWEST * (request.generated - account.expected)
        account.used += (cost - ticket.paid) / account.weight
        self._clock += cost / self._present
        account.live -= 1
        self._present -= 0.0 if account.live else account.weight
        if not self._tickets:
            self._accounts.clear()  # an idle server forgets: nobody has to make up for what nobody else wanted
            self._clock = self._present = 0.0

    def _in(self, ticket: _Ticket) -> None:
        self._accounts[ticket.owner].waiting -= ticket.waits
        ticket.waits = False

    def _account(self, owner: Owner) -> _Account:
        account = self._accounts.get(owner)
        if account is None:
            if len(self._accounts) >= self._tidy_at:
                self._tidy()
            weight = self._weights.get(owner, 1.0) if isinstance(owner, str) else 1.0
            account = self._accounts[owner] = _Account(weight, FIRST_GUESS)
        return account

    def _tidy(self) -> None:
        """Accounts behind the clock that nobody uses are like new ones."""
        self._accounts = {
            owner: account
            for owner, account in self._accounts.items()
            if account.live or account.used > self._clock or account.last > self._clock
        }
        self._tidy_at = max(1024, 2 * len(self._accounts))


def ordering(policy: str, weights: Mapping[str, float] | None = None) -> Ordering:
    """The order of a policy: fcfs and priority (which differ at the door only), or fair."""
    return FairShares(weights) if policy == "fair" else Ordering()
