"""Traces of many adapters: who asks, when, for how much. Seeded; knows nothing of machines or schedulers.

slora        the S-LoRA paper (7.2): every adapter has Gamma arrivals of its own, rates by a power law i^-alpha
slora-code   its released generator: one Gamma process for all, adapter floor(n u^(1/alpha)), so alpha 1 is uniform
zipf         Poisson arrivals, adapter i with weight i^-alpha
bursts       the same, but in the first part of each period requests come `factor` times as fast as in the rest
drift        the same as zipf, but every period the ranks move on by some adapters: the hot ones cool down
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from scheduler.simulate.trace import Ask

KINDS = ("slora", "slora-code", "zipf", "bursts", "drift")


@dataclass(frozen=True)
class Workload:
    """Everything that decides a trace. Lengths are uniform, both ends included.

    `cv`: coefficient of variation of the gaps. `base_share`: requests without an adapter. `tenants`: how many there
    are; an adapter belongs to one. `groups`: prompt prefixes by adapter, of `prefix` tokens each.
    """

    kind: str = "zipf"
    adapters: int = 200
    rate: float = 10.0
    requests: int = 1000
    alpha: float = 1.0
    cv: float = 1.0
    prompt: tuple[int, int] = (8, 511)
    output: tuple[int, int] = (8, 511)
    base_share: float = 0.0
    tenants: int = 0
    groups: int = 0
    prefix: int = 0
    period: float = 60.0
    factor: float = 5.0
    burst_share: float = 0.2
    step: int = 10
    seed: int = 0

    def asks(self) -> list[Ask]:
        """The requests in order of arrival."""
        rng = random.Random(self.seed)
        arrivals = self._each_its_own(rng) if self.kind == "slora" else self._together(rng)
        found = []
        for when, adapter in arrivals:
            base = self.base_share > 0 and rng.random() < self.base_share
            found.append(self._ask(rng, when, None if base else adapter))
        return found

    def _ask(self, rng: random.Random, when: float, adapter: int | None) -> Ask:
        prompt, output = rng.randint(*self.prompt), rng.randint(*self.output)
        group = f"{adapter}.{rng.randrange(self.groups)}" if self.groups else None
        tenant = ""
        if self.tenants:
            tenant = f"t{(rng.randrange(self.tenants) if adapter is None else adapter % self.tenants)}"
        return Ask(
            at=round(when, 6),
            adapter=None if adapter is None else f"a{adapter}",
            prompt=prompt,
            output=output,
            group=group,
            prefix=min(self.prefix, prompt) if group else 0,
            tenant=tenant,
        )

    # ---------------------------------------------------------------------------------------------------- arrivals

    def _each_its_own(self, rng: random.Random) -> list[tuple[float, int]]:
        """Gamma arrivals by adapter, over the time that gives so many requests on average."""
        seconds = self.requests / self.rate
        arrivals = []
        for adapter, share in enumerate(self._shares()):
            rate = self.rate * share
            now = _gap(rng, rate, self.cv) * rng.random()  # the process did not begin with the trace
            while now < seconds:
                arrivals.append((now, adapter))
                now += _gap(rng, rate, self.cv)
        return sorted(arrivals)

    def _together(self, rng: random.Random) -> Iterator[tuple[float, int]]:
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
        quiet = self.rate / (self.burst_share * self.factor + 1 - self.burst_share)
        return quiet * self.factor if now % self.period < self.burst_share * self.period else quiet

    def _shares(self) -> list[float]:
        weights = [(number + 1) ** -self.alpha for number in range(self.adapters)]
        total = sum(weights)
        return [weight / total for weight in weights]


def _gap(rng: random.Random, rate: float, cv: float) -> float:
    """Seconds to the next arrival: Gamma with mean 1/rate; cv 1 is a Poisson process, above it comes in bursts."""
    shape = cv**-2
    return rng.gammavariate(shape, 1 / (rate * shape))
