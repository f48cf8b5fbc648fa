"""Penalties against transformers; counts are kept only for the rows that need them."""

from __future__ import annotations

import numpy as np
import torch

from engine.messages import NewRow, Sampling
from model_runner.compute.sampler.logits_processors.penalties import Penalties
from model_runner.compute.sampler.sampler import Sampler

VOCAB = 40
CPU = torch.device("cpu")


def test_repetition_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    history = [3, 3, 9, 20, 31]
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([history]), logits)
    penalties = Penalties(8, VOCAB, CPU)
    sampling = Sampling(repetition_penalty=1.4)
    penalties.begin(NewRow(row=4, generation=1, prompt_length=2, sampling=sampling, history=history))
    penalties.apply(logits, np.array([4]), np.array([5]))
    torch.testing.assert_close(logits, expected)


def test_counts_exist_for_penalised_rows_and_slots_are_reused() -> None:
    penalties = Penalties(64, VOCAB, CPU)
    sampler = Sampler(64, VOCAB, CPU, [penalties])
    for generation in range(5):
        for row in range(3):
            penalty = 0.5 if row == generation % 3 else 0.0
            sampling = Sampling(temperature=0.0, presence_penalty=penalty)
            sampler.begin(NewRow(row=row, generation=generation, prompt_length=1, sampling=sampling, history=[1]))
    assert penalties.bytes <= 2 * VOCAB * 4
    for row in range(20):
        sampling = Sampling(temperature=0.0, frequency_penalty=100.0)
        sampler.begin(NewRow(row=row, generation=9, prompt_length=0, sampling=sampling, history=[row]))
    logits = torch.zeros(20, VOCAB)
    first = sampler.sample(logits, np.arange(20), np.full(20, 1)).tokens_S.tolist()
    assert first == [1, *[0] * 19]  # only row 0 has generated token 0


def test_penalties_of_an_ended_row_are_not_applied() -> None:
    penalties = Penalties(2, VOCAB, CPU)
    rows, positions = np.array([0, 1]), np.array([2, 2])
    assert not penalties.is_active(rows, positions)
    for row in range(2):
        sampling = Sampling(frequency_penalty=1.0 + row)
        penalties.begin(NewRow(row=row, generation=1, prompt_length=1, sampling=sampling, history=[5, 6]))
    penalties.end(0)
    logits = torch.zeros(2, VOCAB)
    penalties.apply(logits, rows, positions)
    penalties.accept(torch.tensor([8, 9]), rows)
    assert logits.nonzero().tolist() == [[1, 6]]
    assert logits[1, 6] == -2.0
    penalties.apply(logits.zero_(), rows, positions + 1)
    assert logits.nonzero().tolist() == [[1, 6], [1, 9]]
    penalties.reset()
    assert not penalties.is_active(rows, positions)
