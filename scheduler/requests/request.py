"""A request as the scheduler sees it: numbers and tokens. Knows nothing of queues, pages or adapters' states.

A request's tokens:

    tokens    p0 p1 ... p(P-1) | g0 g1 ... | (pending: sampled by steps in flight, not known here yet)
    position  0 ........... computed          those below `computed` were planned into a step
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import Generate, LogprobIds, Sampling, Stopping
from scheduler.types import LaneKey, Node, Order, Stem


@dataclass(slots=True, eq=False)
class Request:
    """One request from arrival to its end; `row` >= 0 while it runs.

    `lora` is what it asked for, by adapter; `key` is the same by copy, and may change while it waits: two adapters may
    turn out to be one. `limit` is the length (prompt and generated) at which it ends. `flights` counts the steps in
    flight that name it,
    `pending` those of them that sample. `decoding`: the runner's row holds its own last sample as the next input.
    `queued_at` is when it last came to the queue.
    `prefix` is the last node of its path in the prefix tree: held while it runs, else where it was found last.
    `cached` is how many prompt tokens were found there when it first ran, until that was told.
    `invoked_at` is the position from which its activated adapter acts, `branch` whose pages begin there while it runs;
    None: no such adapter, as far as is known.
    `scored` counts prompt positions whose log-probability was asked for, `prompt_scores` holds those that came.
    """

    id: int
    key: LaneKey
    order: Order
    prompt_length: int
    tokens: list[int]
    sampling: Sampling
    stopping: Stopping
    cache_salt: str = ""
    priority: int = 0
    queued_at: float = 0.0
    lora: list[tuple[int, float]] = field(default_factory=list)
    limit: int = 0
    row: int = -1
    generation: int = 0
    lane: int = 0
    pages: list[int] = field(default_factory=list)
    prefix: Node | None = None
    invoked_at: int | None = None
    branch: Stem | None = None
    cached: int = 0
    computed: int = 0
    pending: int = 0
    flights: int = 0
    decoding: bool = False
    done: bool = False
    admitted: bool = False
    scored: int = 0
    prompt_scores: list[LogprobIds] = field(default_factory=list)
    scores_sent: bool = False

    @property
    def generated(self) -> int:
        """How many generated tokens are known."""
        return len(self.tokens) - self.prompt_length

    @property
    def names(self) -> set[int]:
        """The adapters that it names; none is the base."""
        return {adapter_id for adapter_id, _ in self.lora if adapter_id}

    @property
    def acts_from(self) -> int:
        """The position from which its lane applies; before, it is the base's request."""
        return self.invoked_at or 0

    @property
    def to_score(self) -> int:
        """How many prompt positions are to be scored: all but the last, or none."""
        return self.prompt_length - 1 if self.sampling.prompt_logprobs >= 0 else 0

    @property
    def needs_history(self) -> bool:
        """Whether a penalty counts the tokens known so far."""
        s = self.sampling
        return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0

    def take_scores(self) -> list[LogprobIds] | None:
        """The prompt's log-probabilities, once, when they were asked for and are complete."""
        asked = self.sampling.prompt_logprobs >= 0 and not self.scores_sent
        if not asked or len(self.prompt_scores) < self.to_score:
            return None
        self.scores_sent = True
        return self.prompt_scores

    def take_cached(self) -> int:
        """How many prompt tokens did not have to be computed for it, once."""
        cached, self.cached = self.cached, 0
        return cached

    def rewind(self) -> None:
        """Everything is to be computed again, in another row; the tokens stay."""
        self.row, self.lane, self.computed, self.decoding = -1, 0, 0, False

    def lose_flights(self) -> None:
        """The steps in flight will never answer: what they were to bring is asked for again. Their KV is lost."""
        self.prefix = self.branch = None
        self.flights = self.pending = 0
        self.scored = len(self.prompt_scores)


def from_message(message: Generate, key: LaneKey, order: Order) -> Request:
    """A request with nothing computed."""
    return Request(
        id=message.request_id,
        lora=message.lora,
        key=key,
        order=order,
        prompt_length=len(message.prompt),
        tokens=[*message.prompt, *message.generated],
        sampling=message.sampling,
        stopping=message.stopping,
        cache_salt=message.cache_salt,
        priority=message.priority,
    )
