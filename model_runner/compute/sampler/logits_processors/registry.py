"""The list of logits processors, in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Callable

import torch

from model_runner.compute.sampler.logits_processors.allowed_tokens import AllowedTokens
from model_runner.compute.sampler.logits_processors.bad_words import BadWords
from model_runner.compute.sampler.logits_processors.base import LogitsProcessor
from model_runner.compute.sampler.logits_processors.logit_bias import LogitBias
from model_runner.compute.sampler.logits_processors.min_tokens import MinTokens
from model_runner.compute.sampler.logits_processors.penalties import Penalties

PROCESSORS: tuple[Callable[[int, int, torch.device], LogitsProcessor], ...] = (
    AllowedTokens,
    LogitBias,
    MinTokens,
    Penalties,
    BadWords,
)


def create_all(rows: int, vocab_size: int, device: torch.device) -> list[LogitsProcessor]:
    """Returns one processor of each class, for a runner of `rows` rows with at most `vocab_size` logits each."""
    return [create(rows, vocab_size, device) for create in PROCESSORS]
