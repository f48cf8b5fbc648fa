"""LogitBias and MinTokens: which logits they change, and in which steps they are active."""

from __future__ import annotations

import numpy as np
import torch

from engine.messages import NewRow, Sampling
from model_runner.compute.sampler.logits_processors.logit_bias import LogitBias
from model_runner.compute.sampler.logits_processors.min_tokens import MinTokens

VOCAB = 10
CPU = torch.device("cpu")
ROWS = np.array([3, 0, 1])


def new_row(row: int, sampling: Sampling) -> NewRow:
    return NewRow(row=row, generation=1, prompt_length=4, sampling=sampling)


def test_logit_bias_adds_to_tokens_inside_the_vocabulary() -> None:
    bias, positions = LogitBias(4, VOCAB, CPU), np.full(3, 4)
    bias.begin(new_row(0, Sampling(logit_bias=[(2, 1.5), (2, 1.0), (9, 3.0), (VOCAB, 5.0), (-1, 5.0)])))
    bias.begin(new_row(1, Sampling(logit_bias=[(0, -2.0)])))
    bias.begin(new_row(3, Sampling(logit_bias=[(VOCAB, 5.0)])))
    assert not bias.is_active(np.array([3, 2]), positions[:2])
    logits = torch.zeros(3, VOCAB - 1)  # this step's logits are narrower than the largest vocabulary
    bias.apply(logits, ROWS, positions)
    assert {tuple(at): float(logits[tuple(at)]) for at in logits.nonzero().tolist()} == {(1, 2): 2.5, (2, 0): -2.0}
    bias.end(0)
    bias.end(1)
    assert not bias.is_active(ROWS, positions)


def test_min_tokens_masks_end_ids_until_enough_tokens() -> None:
    minimum = MinTokens(4, VOCAB, CPU)
    minimum.begin(new_row(0, Sampling(min_tokens=2, end_ids=[7, 8, VOCAB])))
    minimum.begin(new_row(1, Sampling(min_tokens=0, end_ids=[7])))
    minimum.begin(new_row(3, Sampling(min_tokens=5, end_ids=[])))
    assert [minimum.is_active(ROWS, np.full(3, position)) for position in (4, 5, 6)] == [True, True, False]
    logits = torch.zeros(3, VOCAB - 2)
    minimum.apply(logits, ROWS, np.array([4, 5, 4]))
    assert logits.isinf().nonzero().tolist() == [[1, 7]]
    minimum.end(0)
    assert not minimum.is_active(ROWS, np.full(3, 4))
