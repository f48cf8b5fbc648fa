"""A request of the baseline scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from engine.messages import Generate


@dataclass(eq=False, slots=True)
class BaselineRequest:
    """One request from arrival to its end. It runs while `row` >= 0."""

    message: Generate
    arrived: float
    adapter: int  # 0: the base model
    order: int  # its number in order of arrival
    row: int = -1
    computed: int = 0
    known: int = 0  # generated tokens that are known
    sent: int = 0  # `known` plus the samples of steps in flight
    pages: int = 0  # KV pages of its row
    steps_in_flight: int = 0
    prefilled: bool = False

    @property
    def length(self) -> int:
        """The number of known tokens, prompt and generated."""
        return len(self.message.prompt) + self.known

    @property
    def remaining(self) -> int:
        """The number of tokens that the request may still generate."""
        return self.message.stopping.max_tokens - self.known
