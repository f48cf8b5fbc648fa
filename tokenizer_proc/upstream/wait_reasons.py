"""The reasons why requests wait, taken from the scheduler's latest Stats and worded for an operator.

Stats are up to a second old and list only the oldest waiting requests. A reason is reported only if it was certainly
true when the Stats were made.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from engine.messages import Capacity, Stats, WaitingRequest, WaitReason

Lora = list[tuple[int, float]]

LONG = 1.0  # seconds; `long_waiting` lists only longer waits

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
    """What a request waits for, and the seconds that it had waited when the Stats were made, or None if unknown."""

    reason: WaitReason
    seconds: float | None = None


class WaitReasons:
    """The reasons why requests wait, by request. `capacity` provides the numbers in the explanations."""

    def __init__(self) -> None:
        self.capacity: Capacity | None = None
        self.forget()

    def forget(self) -> None:
        """Drops the former scheduler's Stats. Called when a new scheduler, which has sent no Stats yet, takes over."""
        self._stats = Stats()
        self._listed: dict[int, WaitingRequest] = {}
        self._reasons: dict[tuple[tuple[int, float], ...], set[WaitReason]] = {}
        self._newest, self._heard = 0, time.monotonic()

    def update(self, stats: Stats, newest: int, loras: Mapping[int, Lora]) -> None:
        """Stores new Stats.

        `newest` is the id of the last request sent; `loras` are the adapters of the listed requests that are open.
        """
        self._stats, self._newest, self._heard = stats, newest, time.monotonic()
        self._listed = {waiting.request_id: waiting for waiting in stats.oldest_waiting}
        self._reasons = {}
        for request_id, lora in loras.items():
            self._reasons.setdefault(tuple(lora), set()).add(self._listed[request_id].reason)

    def find(self, request_id: int, generated: int, lora: Lora) -> RequestWait | None:
        """Returns what a request waits for, or None if it runs or the reason is not known.

        `generated` is the number of tokens that the request has. A request that is newer than all listed ones certainly
        waits if none of its adapters runs. Its reason is then that of the listed requests with the same adapters, if
        they all have the same reason.
        """
        waiting = self._listed.get(request_id)
        if waiting is not None:  # if the number of tokens differs, the request has run since the Stats were made
            return RequestWait(waiting.reason, waiting.seconds) if waiting.generated == generated else None
        could_be_listed = len(self._listed) == self._stats.waiting or request_id < max(self._listed, default=0)
        if generated or could_be_listed or request_id > self._newest or not lora:
            return None
        if any(self._stats.running_adapters.get(adapter_id) for adapter_id, _ in lora):
            return None
        like = self._reasons.get(tuple(lora), set())
        return RequestWait(next(iter(like))) if len(like) == 1 else None

    def long_waiting(self) -> list[WaitingRequest]:
        """Returns the listed requests that have waited for more than LONG seconds by now."""
        age = time.monotonic() - self._heard
        now = (msgspec.structs.replace(each, seconds=each.seconds + age) for each in self._listed.values())
        return [each for each in now if each.seconds > LONG]

    def summary(self) -> str:
        """Returns a text with the number of waiting requests by reason, and the cause of the most frequent reason.

        The text is empty if no request waits.
        """
        counts = sorted(self._stats.waiting_reasons.items(), key=lambda item: -item[1])
        if not counts:
            return ""
        found = ", ".join(
            f"{count} {'waits' if count == 1 else 'wait'} for {_WANTS[reason]}" for reason, count in counts
        )
        cause = self.cause(counts[0][0])
        return f"{found}. {cause[0].upper()}{cause[1:]}"

    def describe(self, reason: WaitReason) -> str:
        """Returns a reason in words: what the request waits for, and the cause."""
        return f"{_WANTS[reason]}: {self.cause(reason)}"

    def cause(self, reason: WaitReason) -> str:
        """Returns an explanation of `reason`, with the flags that change it."""
        capacity = self.capacity
        if capacity is None:
            return _CAUSES[reason].format(lanes="?", rows="?", tokens="?")
        tokens = capacity.kv_pages * capacity.page_size
        return _CAUSES[reason].format(lanes=capacity.max_loras, rows=capacity.rows, tokens=tokens)
