"""Generates traces with many adapters from a seed. Does not depend on machines or schedulers.

slora        the S-LoRA paper (7.2): each adapter has its own Gamma arrivals, with rates by the power law i^-alpha
slora-code   S-LoRA's released generator: one Gamma process for all adapters; adapter floor(n u^(1/alpha)), where u is
             uniform in [0, 1), so alpha 1 is uniform
zipf         Poisson arrivals, adapter i with weight i^-alpha
bursts       zipf, but in the first part of each period requests arrive `factor` times as fast as in the rest
drift        zipf, but in each period the ranks shift by `step` adapters, so that hot adapters cool down
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from scheduler.simulate.trace import TraceRequest

KINDS = ("slora", "slora-code", "zipf", "bursts", "drift")


@dataclass(frozen=True)
class Workload:
    """All parameters of a trace. Prompt and output lengths are uniform in a range that includes both ends."""

    kind: str = "zipf"
    adapters: int = 200
    rate: float = 10.0  # requests per second
    requests: int = 1000
    alpha: float = 1.0
    cv: float = 1.0  # coefficient of variation of the gaps between arrivals
    prompt: tuple[int, int] = (8, 511)
    output: tuple[int, int] = (8, 511)
    base_share: float = 0.0  # the share of requests for the base model
    tenants: int = 0  # number of tenants; each adapter belongs to one of them
    groups: int = 0  # shared prompt prefixes per adapter
    prefix: int = 0  # tokens of a shared prefix
    period: float = 60.0  # bursts and drift: seconds of a period
    factor: float = 5.0  # bursts: how many times as fast requests arrive in a burst
    burst_share: float = 0.2  # bursts: the share of a period that is a burst
    step: int = 10  # drift: by how many adapters the ranks shift in each period
    seed: int = 0

    def generate(self) -> list[TraceRequest]:
        """Returns the requests in order of arrival."""
        rng = random.Random(self.seed)
        arrivals = self._separate_arrivals(rng) if self.kind == "slora" else self._joint_arrivals(rng)
        found = []
        for when, adapter in arrivals:
            base = self.base_share > 0 and rng.random() < self.base_share
            found.append(self._request(rng, when, None if base else adapter))
        return found

    def _request(self, rng: random.Random, when: float, adapter: int | None) -> TraceRequest:
        prompt, output = rng.randint(*self.prompt), rng.randint(*self.output)
        group = f"{adapter}.{rng.randrange(self.groups)}" if self.groups else None
        tenant = ""
        if self.tenants:
            tenant = f"t{(rng.randrange(self.tenants) if adapter is None else adapter % self.tenants)}"
        return TraceRequest(
            at=round(when, 6),
            adapter=None if adapter is None else f"a{adapter}",
            prompt=prompt,
            output=output,
            group=group,
            prefix=min(self.prefix, prompt) if group else 0,
            tenant=tenant,
        )

    # ---------------------------------------------------------------------------------------------------- arrivals

    def _separate_arrivals(self, rng: random.Random) -> list[tuple[float, int]]:
        """Returns (time, adapter) of separate Gamma arrivals for each adapter, over `requests` / `rate` seconds."""
        seconds = self.requests / self.rate
        arrivals = []
        for adapter, share in enumerate(self._shares()):
            rate = self.rate * share
            now = _gap(rng, rate, self.cv) * rng.random()  # the process began before the trace
            while now < seconds:
                arrivals.append((now, adapter))
                now += _gap(rng, rate, self.cv)
        return sorted(arrivals)

    def _joint_arrivals(self, rng: random.Random) -> Iterator[tuple[float, int]]:
        now, bounds = 0.0, list(accumulate(self._shares()))
        for _ in range(self.requests):
            if self.kind == "slora-code":
                now += _gap(rng, self.rate, self.cv)
                yield now, int(self.adapters * rng.random() ** (1 / self.alpha))
                continue
            now += _gap(rng, self._rate_at(now), self.cv)
            adapter = min(bisect_left(bounds, rng.random() * bounds[-1]), self.adapters - 1)
            if self.kind == "drift":
                adapter = (adapter + self.step * int(now / self.period)) % self.adapters
            yield now, adapter

    def _rate_at(self, now: float) -> float:
        if self.kind != "bursts":
            return self.rate
        outside = self.rate / (self.burst_share * self.factor + 1 - self.burst_share)
        return outside * self.factor if now % self.period < self.burst_share * self.period else outside

    def _shares(self) -> list[float]:
        weights = [(number + 1) ** -self.alpha for number in range(self.adapters)]
        total = sum(weights)
        return [weight / total for weight in weights]


def _gap(rng: random.Random, rate: float, cv: float) -> float:
    """Draws the seconds to the next arrival from a Gamma distribution with mean 1/rate.

    A `cv` of 1 is a Poisson process; a larger one makes bursts.
    """
    shape = cv**-2
    return rng.gammavariate(shape, 1 / (rate * shape))
