"""What requests wait for, from the scheduler's last Stats, in an operator's words. Knows nothing of streams or names.

Stats are up to a second old and list only the oldest waiting requests. A reason that is told was true when the Stats
were made; where that is not certain, no reason is told.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from engine.messages import Capacity, Stats, WaitingRequest, WaitReason

Lora = list[tuple[int, float]]

LONG = 1.0  # seconds: shorter waits are not listed

_WANTS: Mapping[WaitReason, str] = {
    "load": "an adapter to be read",
    "fill": "an adapter to be copied to the device",
    "rank_pages": "rank pages",
    "lanes": "a lane",
    "rows": "a row",
    "pages": "KV pages",
    "turn": "a turn",
    "trial": "the end of an isolation",
}
_CAUSES: Mapping[WaitReason, str] = {
    "load": "what the host does not hold is read from disk (--max-loaded-loras, --lora-host-memory: what it keeps)",
    "fill": "what the device does not hold is copied to it (--lora-pool-size: what it keeps)",
    "rank_pages": "adapters that run or come first use the pool (--lora-pool-size)",
    "lanes": "no more adapters run at a time (--max-loras-per-batch: {lanes})",
    "rows": "no more requests run at a time (--max-running-requests: {rows})",
    "pages": "the KV cache holds {tokens} tokens (--max-total-tokens, --mem-fraction-static)",
    "turn": "other requests go first, as far as a step takes prompts (--max-num-batched-tokens, --max-prefill-tokens)",
    "trial": "the model runner died, and the requests that may have caused it run alone first",
}


class RequestWait(msgspec.Struct, frozen=True):
    """What a request waits for, and for how many seconds it had; None: that is not known."""

    reason: WaitReason
    seconds: float | None = None


class WaitReasons:
    """The reasons by request. `capacity` gives the numbers in the explanations."""

    def __init__(self) -> None:
        self.capacity: Capacity | None = None
        self.forget()

    def forget(self) -> None:
        """Drops what the former scheduler said; a new scheduler has the requests and has sent no Stats yet."""
        self._stats = Stats()
        self._listed: dict[int, WaitingRequest] = {}
        self._reasons: dict[tuple[tuple[int, float], ...], set[WaitReason]] = {}
        self._newest, self._heard = 0, time.monotonic()

    def update(self, stats: Stats, newest: int, loras: Mapping[int, Lora]) -> None:
        """Takes over new Stats. `newest` is the last request sent; `loras` are those of the open listed requests."""
        self._stats, self._newest, self._heard = stats, newest, time.monotonic()
        self._listed = {waiting.request_id: waiting for waiting in stats.oldest_waiting}
        self._reasons = {}
        for request_id, lora in loras.items():
            self._reasons.setdefault(tuple(lora), set()).add(self._listed[request_id].reason)

    def find(self, request_id: int, generated: int, lora: Lora) -> RequestWait | None:
        """What a request with so many generated tokens waits for; None: it runs, or the reason is not known.

        A request that is newer than all listed ones waits for certain if none of its adapters runs; its reason is then
        that of the listed requests with the same adapters, if they agree.
        """
        waiting = self._listed.get(request_id)
        if waiting is not None:  # with another number of tokens it has run since
            return RequestWait(waiting.reason, waiting.seconds) if waiting.generated == generated else None
        could_be_listed = len(self._listed) == self._stats.waiting or request_id < max(self._listed, default=0)
        if generated or could_be_listed or request_id > self._newest or not lora:
            return None
        if any(self._stats.running_adapters.get(adapter_id) for adapter_id, _ in lora):
            return None
        like = self._reasons.get(tuple(lora), set())
        return RequestWait(next(iter(like))) if len(like) == 1 else None

    def long_waiting(self) -> list[WaitingRequest]:
        """The listed requests that have waited for longer than LONG by now."""
        age = time.monotonic() - self._heard
        now = (msgspec.structs.replace(each, seconds=each.seconds + age) for each in self._listed.values())
        return [each for each in now if each.seconds > LONG]

    def summary(self) -> str:
        """How many requests wait for what, and the cause of the commonest reason; empty if none waits."""
        counts = sorted(self._stats.waiting_reasons.items(), key=lambda item: -item[1])
        if not counts:
            return ""
        found = ", ".join(
            f"{count} {'waits' if count == 1 else 'wait'} for {_WANTS[reason]}" for reason, count in counts
        )
        cause = self.cause(counts[0][0])
        return f"{found}. {cause[0].upper()}{cause[1:]}"

    def describe(self, reason: WaitReason) -> str:
        """A reason in words: what is waited for, and the cause."""
        return f"{_WANTS[reason]}: {self.cause(reason)}"

    def cause(self, reason: WaitReason) -> str:
        """Why the request has to wait for it, with the flag that helps."""
        capacity = self.capacity
        if capacity is None:
            return _CAUSES[reason].format(lanes="?", rows="?", tokens="?")
        tokens = capacity.kv_pages * capacity.page_size
        return _CAUSES[reason].format(lanes=capacity.max_loras, rows=capacity.rows, tokens=tokens)
