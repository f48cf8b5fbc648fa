"""What a soak asks for: requests of all kinds, the same ones for the same seed. Knows no server."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

VOICES = ("pirate", "json", "poet", "french")
GUEST = ("pirate", "french")
"""Whose files the guest has, in turn."""


@dataclass(frozen=True)
class Ask:
    """One request; `lora` "guest" may be answered by any of GUEST."""

    prompt: tuple[int, ...]
    lora: Any
    tokens: int
    seed: int | None
    stream: bool

    def body(self, lora: Any) -> dict[str, Any]:
        """For /generate, through this selection."""
        params: dict[str, Any] = {"max_new_tokens": self.tokens, "ignore_eos": True, "temperature": 0}
        if self.seed is not None:
            params |= {"temperature": 1.0, "seed": self.seed, "top_p": 0.9, "frequency_penalty": 0.3}
        return {"input_ids": [*self.prompt], "lora_path": lora, "sampling_params": params, "stream": self.stream}

    @property
    def voices(self) -> tuple[Any, ...]:
        """The selections whose calm answers are right."""
        return GUEST if self.lora == "guest" else (self.lora,)


def make_asks(count: int, draw: random.Random) -> list[Ask]:
    """Requests of all kinds."""
    mixes = [{"pirate": 0.5, "french": 0.5}, {"json": 0.7, "poet": 0.3}]
    loras = [None, *VOICES, *mixes, "guest"]
    return [
        Ask(
            tuple(draw.randrange(8, 300) for _ in range(draw.randrange(2, 60))),
            loras[number % len(loras)],
            draw.choice([4, 16, 40, 120]),
            draw.randrange(1 << 30) if draw.random() < 0.5 else None,
            draw.random() < 0.7,
        )
        for number in range(count)
    ]
