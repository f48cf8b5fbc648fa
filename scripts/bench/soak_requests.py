"""The requests of a soak: of every kind, and the same ones for the same seed. Does not depend on a server."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

ADAPTERS = ("pirate", "json", "poet", "french")
GUEST = ("pirate", "french")
"""The adapters that the name `guest` refers to, in turn."""


@dataclass(frozen=True)
class SoakRequest:
    """One request. A request for the adapter `guest` may run with any adapter in GUEST."""

    prompt: tuple[int, ...]
    lora: Any
    tokens: int
    seed: int | None
    stream: bool

    def body(self, lora: Any) -> dict[str, Any]:
        """Returns the body for /generate with the adapter selection `lora`."""
        params: dict[str, Any] = {"max_new_tokens": self.tokens, "ignore_eos": True, "temperature": 0}
        if self.seed is not None:
            params |= {"temperature": 1.0, "seed": self.seed, "top_p": 0.9, "frequency_penalty": 0.3}
        return {"input_ids": [*self.prompt], "lora_path": lora, "sampling_params": params, "stream": self.stream}

    @property
    def selections(self) -> tuple[Any, ...]:
        """The adapter selections of which any undisturbed output is a correct output of this request."""
        return GUEST if self.lora == "guest" else (self.lora,)


def make_requests(count: int, draw: random.Random) -> list[SoakRequest]:
    """Returns `count` random requests for the base, every adapter, mixes and `guest`."""
    mixes = [{"pirate": 0.5, "french": 0.5}, {"json": 0.7, "poet": 0.3}]
    loras = [None, *ADAPTERS, *mixes, "guest"]
    return [
        SoakRequest(
            tuple(draw.randrange(8, 300) for _ in range(draw.randrange(2, 60))),
            loras[number % len(loras)],
            draw.choice([4, 16, 40, 120]),
            draw.randrange(1 << 30) if draw.random() < 0.5 else None,
            draw.random() < 0.7,
        )
        for number in range(count)
    ]
