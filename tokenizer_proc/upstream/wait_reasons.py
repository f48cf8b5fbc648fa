"""What requests wait for, as the scheduler said last, in an operator's words. Knows nothing of streams or names.

The picture is up to a second old, and tells one by one of the oldest who wait. What is said of a request was true when
the picture was made; where that is not known, nothing is said.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from engine.messages import Capacity, Stats, WaitingRequest, WaitReason

Lora = list[tuple[int, float]]

LONG = 1.0  # seconds: who waits less is not told of

_WANTS: Mapping[WaitReason, str] = {
    "load": "an adapter to be read",
    "fill": "an adapter to be copied to the device",
    "rank_pages": "rank pages",
    "lanes": "a lane",
    "rows": "a row",
    "pages": "KV pages",
    "turn": "a turn",
    "trial": "the trial of others",
}
_CAUSES: Mapping[WaitReason, str] = {
    "load": "what the host does not hold is read from disk (--max-loaded-loras, --lora-host-memory: what it keeps)",
    "fill": "what the device does not hold is copied to it (--lora-pool-size: what it keeps)",
    "rank_pages": "adapters that run or come first use the pool (--lora-pool-size)",
    "lanes": "no more adapters run at a time (--max-loras-per-batch: {lanes})",
    "rows": "no more requests run at a time (--max-running-requests: {rows})",
    "pages": "the KV cache holds {tokens} tokens (--max-total-tokens, --mem-fraction-static)",
    "turn": "others go first, as far as a step takes prompts (--max-num-batched-tokens, --max-prefill-tokens)",
    "trial": "the model runner died, and those who may have ended it run alone first",
}


class RequestWait(msgspec.Struct, frozen=True):
    """For what a request waits, and how many seconds it had done so; None: nobody counted them."""

    reason: WaitReason
    seconds: float | None = None


class WaitReasons:
    """The newest picture. `capacity` gives the numbers in causes."""

    def __init__(self) -> None:
        self.capacity: Capacity | None = None
        self.forget()

    def forget(self) -> None:
        """Another scheduler has the requests, and has not said anything yet."""
        self._stats = Stats()
        self._listed: dict[int, WaitingRequest] = {}
        self._reasons: dict[tuple[tuple[int, float], ...], set[WaitReason]] = {}
        self._newest, self._heard = 0, time.monotonic()

    def take(self, stats: Stats, newest: int, loras: Mapping[int, Lora]) -> None:
        """A picture; `newest` is the last request that was sent before it came, `loras` are those of who is open."""
        self._stats, self._newest, self._heard = stats, newest, time.monotonic()
        self._listed = {waiting.request_id: waiting for waiting in stats.oldest_waiting}
        self._reasons = {}
        for request_id, lora in loras.items():
            self._reasons.setdefault(tuple(lora), set()).add(self._listed[request_id].reason)

    def of(self, request_id: int, generated: int, lora: Lora) -> RequestWait | None:
        """What a request with so many tokens waits for; None: it runs, or nobody knows.

        Of those who are not listed, and came later than all who are, one waits for sure if its adapters do not run.
        """
        waiting = self._listed.get(request_id)
        if waiting is not None:  # with other tokens than it has, it ran since
            return RequestWait(waiting.reason, waiting.seconds) if waiting.generated == generated else None
        is_told_of = len(self._listed) == self._stats.waiting or request_id < max(self._listed, default=0)
        if generated or is_told_of or request_id > self._newest or not lora:
            return None
        if any(self._stats.running_adapters.get(adapter_id) for adapter_id, _ in lora):
            return None
        like = self._reasons.get(tuple(lora), set())
        return RequestWait(next(iter(like))) if len(like) == 1 else None

    def long(self) -> list[WaitingRequest]:
        """Those of the oldest who wait for long, as of now."""
        age = time.monotonic() - self._heard
        now = (msgspec.structs.replace(each, seconds=each.seconds + age) for each in self._listed.values())
        return [each for each in now if each.seconds > LONG]

    def mostly(self) -> str:
        """How many wait for what, and why the most do, as a beginning of sentences; empty if nobody waits."""
        counts = sorted(self._stats.waiting_reasons.items(), key=lambda item: -item[1])
        if not counts:
            return ""
        found = ", ".join(
            f"{count} {'waits' if count == 1 else 'wait'} for {_WANTS[reason]}" for reason, count in counts
        )
        cause = self.cause(counts[0][0])
        return f"{found}. {cause[0].upper()}{cause[1:]}"

    def want(self, reason: WaitReason) -> str:
        """The reason in words: what is waited for, and why that takes its time."""
        return f"{_WANTS[reason]}: {self.cause(reason)}"

    def cause(self, reason: WaitReason) -> str:
        """Why there is nothing of it left, with the flag that helps."""
        capacity = self.capacity
        if capacity is None:
            return _CAUSES[reason].format(lanes="?", rows="?", tokens="?")
        tokens = capacity.kv_pages * capacity.page_size
        return _CAUSES[reason].format(lanes=capacity.max_loras, rows=capacity.rows, tokens=tokens)
