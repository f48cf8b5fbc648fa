"""Workloads: seeded lists of requests with lengths, adapters and arrival times. Sends nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DISTRIBUTIONS = ("none", "single", "round-robin", "power-law")


@dataclass(frozen=True)
class Lengths:
    """A fixed number of tokens, or a uniform range with both ends included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Parses `128` or `64:256`. Raises ValueError on any other text."""
        low, _, high = text.partition(":")
        lengths = cls(int(low), int(high or low))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r} is not a length: give N or LOW:HIGH with 1 <= LOW <= HIGH")
        return lengths

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class Request:
    """A request to send: its prompt in token ids, its output tokens, its adapter, and when it is due (seconds)."""

    prompt: list[int]
    output_len: int
    adapter: str | None
    due: float


@dataclass(frozen=True)
class Plan:
    """All settings that determine a workload: `requests(seed)` is the same for the same plan and seed."""

    count: int
    input_len: Lengths
    output_len: Lengths
    token_ids: tuple[int, int]
    adapters: Sequence[str]
    distribution: str
    alpha: float
    rate: float | None
    burstiness: float

    def requests(self, seed: int) -> list[Request]:
        """Returns the requests in order of arrival. Without a rate all are due at once, for a closed loop."""
        rng = random.Random(seed)
        choose = chooser(self.distribution, self.adapters, self.alpha, rng)
        requests, now = [], 0.0
        for i in range(self.count):
            prompt = rng.choices(range(self.token_ids[0], self.token_ids[1] + 1), k=self.input_len.draw(rng))
            requests.append(Request(prompt, self.output_len.draw(rng), choose(i), now))
            if self.rate is not None:
                now += gap(self.rate, self.burstiness, rng)
        return requests


def gap(rate: float, burstiness: float, rng: random.Random) -> float:
    """Returns seconds to the next arrival: gamma with mean 1/rate. Shape 1 is a Poisson process; below 1, bursts."""
    return rng.gammavariate(burstiness, 1 / (rate * burstiness))


def chooser(
    distribution: str, adapters: Sequence[str], alpha: float, rng: random.Random
) -> Callable[[int], str | None]:
    """Returns a function from the number of a request to its adapter; None is the base.

    power-law: the k-th name has weight k^-alpha. Raises ValueError for an unknown distribution, or if it needs adapters
    and there are none.
    """
    if distribution == "none":
        return lambda i: None
    if not adapters:
        raise ValueError(f"--adapters {distribution} needs adapters: give --adapter-names, or load some on the server")
    if distribution == "single":
        return lambda i: adapters[0]
    if distribution == "round-robin":
        return lambda i: adapters[i % len(adapters)]
    if distribution == "power-law":
        weights = [rank**-alpha for rank in range(1, len(adapters) + 1)]
        return lambda i: rng.choices(adapters, weights)[0]
    raise ValueError(f"{distribution!r} is not one of {', '.join(DISTRIBUTIONS)}")
