"""The whole sampler against a slow reference in numpy and Python; and a single row against the same row in a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import NewRow, Sampling
from model_runner.compute.sampler import sampler as sampler_module
from model_runner.compute.sampler.sampler import Sampler

VOCAB = 40
CPU = torch.device("cpu")


@dataclass
class Request:
    """A request: its parameters, and its tokens so far."""

    sampling: Sampling
    prompt: list[int]
    output: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)

    def new_row(self, row: int, generation: int = 1) -> NewRow:
        return NewRow(
            row=row,
            generation=generation,
            prompt_length=len(self.prompt),
            sampling=self.sampling,
            history=[*self.prompt, *self.output],
        )


def processed(logits: np.ndarray, request: Request) -> np.ndarray:
    """Returns the logits after all logits processors, computed token by token in float64."""
    s, x = request.sampling, logits.astype(np.float64).copy()
    if s.allowed_token_ids:
        x[[token for token in range(len(x)) if token not in s.allowed_token_ids]] = -np.inf
    for token, value in s.logit_bias:
        x[token] += value
    if len(request.output) < s.min_tokens:
        x[s.end_ids] = -np.inf
    for token in range(len(x)):
        count = request.output.count(token)
        if count or token in request.prompt:
            x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
        x[token] -= s.frequency_penalty * count + (s.presence_penalty if count else 0.0)
    bad = {word[-1] for word in s.bad_words if request.output[len(request.output) - len(word) + 1 :] == word[:-1]
           and len(request.output) >= len(word) - 1}  # fmt: skip
    left = [token for token in range(len(x)) if token not in bad and x[token] > -np.inf]
    if left:
        x[[*bad]] = -np.inf
    return x


def cdf(x: np.ndarray, s: Sampling) -> np.ndarray:
    """Returns the cumulated probabilities in token-id order after temperature and filters."""
    x = x / s.temperature
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))[: s.top_k or len(x)]
    weight = {token: math.exp(x[token] - x[order[0]]) for token in order}
    kept, mass, total = set(), 0.0, sum(weight.values())
    for token in order:
        if kept and s.top_p < 1.0 and mass >= s.top_p * total:
            break
        kept.add(token)
        mass += weight[token]
    p = np.array([weight[t] if t in kept and weight[t] >= s.min_p else 0.0 for t in range(len(x))])
    return np.cumsum(p / p.sum())


def uniform(seed: int, position: int) -> float:
    word = (1 << 64) - 1
    golden = 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    return (mix((mix((seed + golden) & word) + (position + 1) * golden) & word) >> 11) / 2**53


def expected(logits: np.ndarray, request: Request) -> int | None:
    """Returns the token of the reference, or None if rounding could decide between tokens."""
    x = processed(logits, request)
    if request.sampling.temperature == 0.0:
        return int(x.argmax())
    edges, u = cdf(x, request.sampling), uniform(request.sampling.seed, request.position)
    return None if np.abs(edges - u).min() < 1e-5 else int(np.searchsorted(edges, u, side="right"))


tokens = st.integers(0, VOCAB - 1)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 7, VOCAB, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, (1 << 64) - 1),
    min_tokens=st.integers(0, 4),
    end_ids=st.lists(tokens, max_size=3, unique=True),
    logit_bias=st.lists(st.tuples(tokens, st.sampled_from([-100.0, -1.5, 2.0])), max_size=3),
    logprobs=st.sampled_from([-1, 0, 3]),
    allowed_token_ids=st.lists(st.integers(4, VOCAB - 1), max_size=6, unique=True),
    bad_words=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=4),
)
requests = st.builds(Request, samplings, st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=5))


def run(batch: list[Request], rows: list[int], steps: list[torch.Tensor], sampler: Sampler) -> list[list[int]]:
    for request, row in zip(batch, rows, strict=True):
        sampler.begin(request.new_row(row))
    drawn: list[list[int]] = [[] for _ in batch]
    for step, logits in enumerate(steps):
        positions = np.array([request.position + step for request in batch])
        result = sampler.sample(logits, np.array(rows), positions).tokens_S.tolist()
        for tokens_of_row, token in zip(drawn, result, strict=True):
            tokens_of_row.append(token)
    return drawn


@given(st.lists(requests, min_size=1, max_size=5), st.integers(0, 10_000))
@settings(max_examples=150)
def test_every_step_equals_the_slow_reference(batch: list[Request], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(8, VOCAB, CPU)
    rows = [7 - index for index in range(len(batch))]
    for request, row in zip(batch, rows, strict=True):
        sampler.begin(request.new_row(row))
    for _ in range(3):
        logits = torch.randn(len(batch), VOCAB, generator=generator) * 3
        positions = np.array([request.position for request in batch])
        got = sampler.sample(logits, np.array(rows), positions).tokens_S.tolist()
        for request, token, row_logits in zip(batch, got, logits.numpy(), strict=True):
            want = expected(row_logits, request)
            assert want is None or token == want
            request.output.append(token)


@given(st.lists(requests, min_size=2, max_size=6), st.integers(0, 10_000), st.data())
@settings(max_examples=60)
def test_request_draws_the_same_alone_and_in_any_batch(batch: list[Request], seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randn(len(batch), VOCAB, generator=generator) * 2 for _ in range(3)]
    order = data.draw(st.permutations(range(len(batch))))
    together = run(batch, list(order), steps, Sampler(8, VOCAB, CPU))
    for index, request in enumerate(batch):
        alone = run([request], [3], [logits[index : index + 1] for logits in steps], Sampler(8, VOCAB, CPU))
        assert alone[0] == together[index]


def test_replay_continues_with_the_same_tokens() -> None:
    words = [[a, b, c] for a in range(0, VOCAB, 2) for b in range(0, VOCAB, 3) for c in (1, 2)]
    sampling = Sampling(
        temperature=1.0, top_p=0.9, presence_penalty=0.5, repetition_penalty=1.2, seed=5, bad_words=words
    )
    steps = [torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    whole = run([Request(sampling, [1, 2])], [0], steps, Sampler(2, VOCAB, CPU))[0]
    half = Request(sampling, [1, 2], whole[:3])
    assert run([half], [1], steps[3:], Sampler(2, VOCAB, CPU))[0] == whole[3:]


def test_bad_words_are_banned_only_behind_their_beginning() -> None:
    """The best token is 3 each time: it is banned behind 1 2 alone, and everywhere once it is a word of its own."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 9.0
    for output, words, expected_token in (
        ([], [[1, 2, 3]], 3),
        ([2], [[1, 2, 3]], 3),
        ([1, 2], [[1, 2, 3]], 0),
        ([1, 2, 5], [[1, 2, 3]], 3),
        ([1, 2], [[1, 2, 3], [0]], 1),
        ([], [[3]], 0),
    ):
        request = Request(Sampling(temperature=0.0, bad_words=words), [1, 2], output)
        assert run([request], [0], [logits], Sampler(2, VOCAB, CPU)) == [[expected_token]]


def test_bad_words_that_leave_no_token_are_let_through() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    words = [[7, 7], [7, 8], [5]]
    request = Request(Sampling(temperature=1.0, seed=3, allowed_token_ids=[7, 8], bad_words=words), [1], [7])
    assert run([request], [0], [logits] * 4, Sampler(2, VOCAB, CPU))[0][0] in (7, 8)


def test_asked_log_probabilities_come_in_their_order() -> None:
    sampler = Sampler(3, VOCAB, CPU)
    wanted = [[5, 1, 5], [], [9]]
    for row, ids in enumerate(wanted):
        sampling = Sampling(temperature=0.0, logprobs=1, token_ids_logprob=ids)
        sampler.begin(NewRow(row=row, generation=1, prompt_length=1, sampling=sampling))
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(8))
    found = sampler.sample(logits, np.arange(3), np.ones(3, np.int64)).messages()
    raw = torch.log_softmax(logits.double(), -1)
    for row, ids in enumerate(wanted):
        assert found[row].asked == pytest.approx(raw[row, ids].tolist(), abs=1e-5)
    sampler.begin(NewRow(row=0, generation=2, prompt_length=1, sampling=Sampling(temperature=0.0, logprobs=1)))
    assert sampler.sample(logits, np.arange(3), np.ones(3, np.int64)).messages()[0].asked == []


def test_greedy_row_takes_the_lowest_of_equally_good_tokens() -> None:
    sampler = Sampler(2, VOCAB, CPU)
    for row, temperature in enumerate([0.0, 1e-9]):
        sampling = Sampling(temperature=temperature)
        sampler.begin(NewRow(row=row, generation=1, prompt_length=1, sampling=sampling))
    logits = torch.zeros(2, VOCAB)
    logits[:, [7, 30]] = 90.0
    assert sampler.sample(logits, np.array([0, 1]), np.array([1, 1])).tokens_S.tolist() == [7, 7]


def test_slices_of_a_large_batch_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [Request(Sampling(seed=i, top_k=5 * (i % 2)), [1]) for i in range(16)]
    steps = [torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(0))]
    whole = run(batch, list(range(16)), steps, Sampler(16, VOCAB, CPU))
    monkeypatch.setattr(sampler_module, "SLICE_ELEMENTS", 3 * VOCAB)
    assert run(batch, list(range(16)), steps, Sampler(16, VOCAB, CPU)) == whole
    assert len({tokens[0] for tokens in whole}) > 3


def test_logprobs_are_raw_and_as_wide_as_each_row_asks() -> None:
    asked = [-1, 0, 2, 5]
    sampler = Sampler(4, VOCAB, CPU)
    for row, k in enumerate(asked):
        sampling = Sampling(temperature=0.5, top_k=3, seed=row, logprobs=k, logit_bias=[(11, 100.0)])
        sampler.begin(NewRow(row=row, generation=1, prompt_length=1, sampling=sampling))
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(8))
    found = sampler.sample(logits, np.arange(4), np.ones(4, np.int64)).messages()
    raw = torch.log_softmax(logits.double(), -1)
    assert sorted(found) == [1, 2, 3]
    for row, entry in found.items():
        assert entry.token_id == 11
        assert entry.logprob == pytest.approx(float(raw[row, 11]), abs=1e-5)
        best = raw[row].sort(descending=True)
        assert [token for token, _ in entry.top] == best.indices[: asked[row]].tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values[: asked[row]].tolist(), abs=1e-5)


def test_logits_are_unchanged_and_reset_forgets_rows() -> None:
    sampler = Sampler(1, VOCAB, CPU)
    sampling = Sampling(temperature=0.0, frequency_penalty=5.0, logit_bias=[(3, 9.0)], min_tokens=9, end_ids=[4, 10**6])
    new = NewRow(row=0, generation=1, prompt_length=1, sampling=sampling, history=[1, 3, 3])
    sampler.begin(new)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    before = logits.clone()
    sampler.sample(logits, np.array([0]), np.array([3]))
    assert torch.equal(logits, before)
    sampler.reset()
    logits[0, 4] = 50.0
    assert sampler.sample(logits, np.array([0]), np.array([1])).tokens_S.tolist() == [4]


def test_fast_paths_give_the_tokens_of_the_general_path() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(12)) * 2
    plain = [Request(Sampling(seed=row), [1]) for row in range(6)]
    general = [Request(Sampling(seed=row, top_k=VOCAB, logit_bias=[(0, 0.0)]), [1]) for row in range(6)]
    rows = list(range(6))
    assert run(plain, rows, [logits], Sampler(6, VOCAB, CPU)) == run(general, rows, [logits], Sampler(6, VOCAB, CPU))
    greedy = [Request(Sampling(temperature=0.0), [1]) for _ in rows]
    best = [Request(Sampling(seed=row, top_k=1), [1]) for row in rows]
    assert run(greedy, rows, [logits], Sampler(6, VOCAB, CPU)) == run(best, rows, [logits], Sampler(6, VOCAB, CPU))
