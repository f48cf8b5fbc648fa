"""The seam of attacks: a kind of attack is one coroutine that makes one bounded round of it.

    @kind("bodies.gzip_bomb")
    async def gzip_bomb(target, draw): ...

A round draws from its own seeded generator, sends what it has to, and checks the answers: `Broken` says which promise
of the manual was not kept. It does not know the victim, whose streams another process watches.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attacks.target import Target

Round = Callable[["Target", random.Random], Awaitable[None]]
KINDS: dict[str, Kind] = {}
"""All kinds of attack by name; `attacks.kinds` fills it when it is imported."""


class Broken(Exception):
    """The server broke a promise."""


class Skipped(Exception):
    """The attack cannot be made on this machine."""


@dataclass(frozen=True)
class Kind:
    """One kind of attack. A round that lasts longer than `seconds` counts as a hang."""

    name: str
    one_round: Round
    seconds: float
    is_fault: bool

    @property
    def summary(self) -> str:
        """The first line of the attack's docstring."""
        return (self.one_round.__doc__ or "").strip().partition("\n")[0]


def kind(name: str, seconds: float = 150.0) -> Callable[[Round], Round]:
    """Registers a coroutine as a kind of attack. A name that starts with `faults.` hurts processes and disks."""

    def register(one_round: Round) -> Round:
        assert name not in KINDS, name
        KINDS[name] = Kind(name, one_round, seconds, name.startswith("faults."))
        return one_round

    return register


def choose(wanted: str | None, faults: str | None) -> list[Kind]:
    """Returns the kinds of two lists like `bodies,rates.burst`, of names or groups. None of `wanted`: all but faults.

    Raises ValueError for an unknown name.
    """
    chosen = [each for each in KINDS.values() if not each.is_fault] if wanted is None else _named(wanted)
    return chosen + [each for each in _named(faults or "") if each not in chosen]


def _named(words: str) -> list[Kind]:
    chosen: dict[str, Kind] = {}
    for word in filter(None, words.split(",")):
        found = {name: each for name, each in KINDS.items() if name == word or name.startswith(word + ".")}
        if not found:
            raise ValueError(f"no kind of attack is called {word}; --list shows all")
        chosen |= found
    return list(chosen.values())
