"""The interface of a logits processor, as the sampler uses it, with a fake that records the calls."""

from __future__ import annotations

import numpy as np
import torch

from engine.messages import NewRow, Sampling
from model_runner.compute.sampler.logits_processors.base import LogitsProcessor
from model_runner.compute.sampler.parameters import Ints
from model_runner.compute.sampler.sampler import Sampler

VOCAB = 40
CPU = torch.device("cpu")


class OneToken(LogitsProcessor):
    """Allows only the token of each row's history; records the calls."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.calls: list[tuple[str, list[int]]] = []

    def begin(self, new: NewRow) -> None:
        self.calls.append(("begin", [new.row]))
        if new.history:
            self.tokens[new.row] = new.history[-1]

    def end(self, row: int) -> None:
        self.calls.append(("end", [row]))
        self.tokens.pop(row, None)

    def reset(self) -> None:
        self.tokens.clear()

    def is_active(self, rows: Ints, positions: Ints) -> bool:
        return not self.tokens.keys().isdisjoint(rows.tolist())

    def apply(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> None:
        self.calls.append(("apply", positions.tolist()))
        for index, row in enumerate(rows.tolist()):
            if row in self.tokens:
                allowed = logits_SV[index, self.tokens[row]].item()
                logits_SV[index] = -torch.inf
                logits_SV[index, self.tokens[row]] = allowed

    def accept(self, tokens_S: torch.Tensor, rows: Ints) -> None:
        self.calls.append(("accept", tokens_S.tolist()))


def test_processor_is_called_only_in_steps_with_its_rows() -> None:
    processor = OneToken()
    sampler = Sampler(3, VOCAB, CPU, [processor])
    for row, history in enumerate([[], [7], []]):
        sampling = Sampling(temperature=0.0)
        sampler.begin(NewRow(row=row, generation=1, prompt_length=1, sampling=sampling, history=history))
    assert processor.calls == [(name, [row]) for row in range(3) for name in ("end", "begin")]
    processor.calls.clear()
    logits = torch.zeros(2, VOCAB)
    logits[:, 30] = 1.0
    assert sampler.sample(logits, np.array([0, 2]), np.array([1, 1])).tokens_S.tolist() == [30, 30]
    assert processor.calls == []
    assert sampler.sample(logits, np.array([1, 0]), np.array([5, 2])).tokens_S.tolist() == [7, 30]
    assert processor.calls == [("apply", [5, 2]), ("accept", [7, 30])]
    sampler.reset()
    assert sampler.sample(logits, np.array([1, 0]), np.array([6, 3])).tokens_S.tolist() == [30, 30]


def test_processors_are_applied_in_the_order_of_the_list() -> None:
    sampling = Sampling(temperature=0.0)
    logits = torch.zeros(1, VOCAB)
    first, second = OneToken(), OneToken()
    sampler = Sampler(1, VOCAB, CPU, [first, second])
    sampler.begin(NewRow(row=0, generation=1, prompt_length=1, sampling=sampling, history=[3]))
    second.tokens[0] = 9  # the first allows token 3, so the second leaves no token at all
    assert sampler.sample(logits, np.array([0]), np.array([1])).tokens_S.tolist() == [0]
    first.tokens[0] = 9
    assert sampler.sample(logits, np.array([0]), np.array([2])).tokens_S.tolist() == [9]
