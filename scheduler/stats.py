"""The counters behind the Stats message. Knows nothing of when it is sent."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Events since the start of the scheduler."""

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
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=4096))  # of steps not reported yet

    def pop_step_seconds(self) -> list[float]:
        """The times of the steps since the last call."""
        seconds = list(self.step_seconds)
        self.step_seconds.clear()
        return seconds
