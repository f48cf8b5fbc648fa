"""The counters from which the Stats message is built."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Counts of events since the start of the scheduler."""

    steps: int = 0
    preemptions: int = 0
    lane_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    adapter_hits: int = 0
    adapter_fills: int = 0
    adapter_evictions: int = 0
    adapter_loads: int = 0
    host_evictions: int = 0
    audits: int = 0
    cached_tokens: int = 0
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=4096))  # not reported yet

    def pop_step_seconds(self) -> list[float]:
        """Returns the seconds of each step since the last call, and forgets them."""
        seconds = list(self.step_seconds)
        self.step_seconds.clear()
        return seconds
