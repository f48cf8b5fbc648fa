"""The scheduler's record of a request: its tokens, its parameters and its progress.

A request's tokens:

    tokens    p0 p1 ... p(P-1) | g0 g1 ... | (pending: sampled by steps in flight, not known here yet)
    position  0 ........... computed          positions below `computed` were planned into a step
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import Generate, Sampling, Stopping
from scheduler.types import LaneKey, Namespace, Node, Order


@dataclass(slots=True, eq=False)
class Request:
    """One request from arrival to its end. It runs while `row` >= 0."""

    id: int
    key: LaneKey  # `lora` by adapter copy; changes while the request waits if two adapters turn out to be one copy
    order: Order  # its sort key in the queue and among the rows
    prompt_length: int
    tokens: list[int]  # prompt and known generated tokens
    sampling: Sampling
    stopping: Stopping
    cache_salt: str = ""
    priority: int = 0  # lower goes first
    queued_at: float = 0.0  # when it was last put into the queue, in seconds
    lora: list[tuple[int, float]] = field(default_factory=list)  # (adapter id, scale), as in the client's request
    limit: int = 0  # the length (prompt and generated tokens) at which the request ends
    row: int = -1
    generation: int = 0  # the generation of its row (see scheduler.requests.rows)
    lane: int = 0
    pages: list[int] = field(default_factory=list)  # KV pages of its row, shared ones first
    prefix: Node | None = None  # last node of its path in the radix tree: held while it runs, else as last found
    invocation_start: int | None = None  # the position from which its activated LoRA acts; None: no activated LoRA
    alora: Namespace | None = None  # the namespace of its activated LoRA's KV pages, held while it runs
    cached: int = 0  # prompt tokens found in the radix tree when it first ran, until they are reported
    computed: int = 0  # positions that were planned into a step
    pending: int = 0  # samples of steps in flight
    steps_in_flight: int = 0  # steps in flight that contain a chunk of this request
    decoding: bool = False  # the runner's row holds the last sampled token as its next input
    done: bool = False
    admitted: bool = False  # it has had a row at least once
    queued: float = 0.0  # seconds from its arrival to its first row
    scored: int = 0  # prompt positions whose log-probability was planned
    scores_known: int = 0  # prompt positions whose log-probability has arrived

    @property
    def generated(self) -> int:
        """The number of known generated tokens."""
        return len(self.tokens) - self.prompt_length

    @property
    def adapter_ids(self) -> set[int]:
        """The adapters of its selection, without the base model."""
        return {adapter_id for adapter_id, _ in self.lora if adapter_id}

    @property
    def is_suspect(self) -> bool:
        """Whether it goes before all other requests because it may have ended a runner; see batching.isolation."""
        return self.order[0] < 0

    @property
    def acts_from(self) -> int:
        """The position from which its lane applies; the base model computes the positions before it."""
        return self.invocation_start or 0

    @property
    def to_score(self) -> int:
        """The number of prompt positions that get a log-probability: all but the last if the client asked, else 0."""
        return self.prompt_length - 1 if self.sampling.prompt_logprobs >= 0 else 0

    @property
    def score_width(self) -> int:
        """The number of log-probabilities that a scored position of the prompt has."""
        return 1 + self.sampling.prompt_logprobs + len(self.sampling.token_ids_logprob)

    @property
    def needs_history(self) -> bool:
        """Whether a sampling penalty, or a search for bad words, needs the tokens known so far."""
        s = self.sampling
        return (
            bool(s.bad_words) or s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0
        )

    def pop_cached(self) -> int:
        """Returns the number of prompt tokens that were found in the radix tree, and resets it to 0."""
        cached, self.cached = self.cached, 0
        return cached

    def reset_progress(self) -> None:
        """Resets the row and the computed positions, so that all tokens are computed again in another row."""
        self.row, self.lane, self.computed, self.decoding = -1, 0, 0, False

    def lose_steps_in_flight(self) -> None:
        """Drops the steps in flight of a runner that ended, and the KV: samples and scores are planned again."""
        self.prefix = self.alora = None
        self.steps_in_flight = self.pending = 0
        self.scored = self.scores_known


def from_message(message: Generate, key: LaneKey, order: Order) -> Request:
    """Builds the request of a Generate message, with no position computed yet."""
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
