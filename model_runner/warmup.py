"""Steps made by hand before the first request: every kernel variant is launched, and so compiled, before Ready.

    voices   the base | one adapter of one page | all lanes, of one page and of as many as a lane may have
    sizes    1, 2, 4, .. rows that decode | 1, 2, 4, .. tokens of prefill | both together
    sampling greedy, drawn, filtered, penalised, with log-probabilities of tokens and prompts

All rows use page 0, which is scratch, and rank pages that hold zeros but are said to be full, so the answers mean
nothing. Afterwards the runner is as new. Knows nothing of kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from tqdm import tqdm

from engine.messages import Capacity, Chunk, LanePages, NewRow, Sampling, Step
from model_runner.lora.normal_form import PAGE_RANK
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import EMBED, EXPERTS, full_weights_of, vectors_of
from model_runner.runner import Runner

GREEDY = Sampling(temperature=0.0)
SAMPLINGS = (
    Sampling(temperature=1.0),
    Sampling(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01),
    Sampling(temperature=0.0, repetition_penalty=1.1, presence_penalty=0.1, logit_bias=[(0, 1.0)]),
    Sampling(temperature=0.0, min_tokens=9, end_ids=[0], logprobs=5),
)
UNRECORDED = (EXPERTS, full_weights_of(EMBED))
PLENTY = 32  # rows that the ways of sampling are tried with, at most


def warm_up(runner: Runner, *, progress: bool = False) -> None:
    """Runs them all; the runner must not have served yet, and is reset in the end."""
    maker = StepMaker(runner.capacity)
    pages = runner.rank_pages
    with _pretending(pages):
        steps = [step for voice in _voices(pages, runner.capacity) for step in maker.sizes(voice)]
        steps += [maker.sampled(sampling) for sampling in SAMPLINGS]
        steps.append(maker.scored())
        for step in tqdm(steps, desc="warm-up", disable=not progress, leave=False):
            runner.execute(step)
    runner.reset()


class StepMaker:
    """Steps over rows 0, 1, ..., whatever they held before."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._ids = count(1)

    def sizes(self, voice: list[LanePages]) -> Iterator[Step]:
        """Decodes, prefills and both, of all sizes; the rows go through the voice's lanes in turn (none: the base)."""
        lanes = [lane.lane for lane in voice] or [0]
        rows, most = self._capacity.rows, self._capacity.max_batched_tokens
        for number in _powers(min(rows, most)):
            yield self._step([1] * number, lanes, voice)
        for tokens in _powers(min(most, rows * self._longest)):
            yield self._step(self._split(tokens), lanes, voice)
        both = [*self._split(max(1, min(most, self._longest) // 2)), 1, 1][:rows]
        yield self._step(both if sum(both) <= most else [1], lanes, voice)

    def sampled(self, sampling: Sampling) -> Step:
        """A few rows that all sample so."""
        number = min(PLENTY, self._capacity.rows, self._capacity.max_batched_tokens)
        return self._step([1] * number, [0], [], sampling)

    def scored(self) -> Step:
        """A prompt whose log-probabilities are asked for."""
        length = max(1, min(8, self._longest, self._capacity.max_batched_tokens))
        return self._step([length], [0], [], Sampling(temperature=0.0, prompt_logprobs=1), scores=length > 1)

    @property
    def _longest(self) -> int:
        """What a row can take in one step and still have a token to go."""
        return max(1, self._capacity.max_length - 1)

    def _split(self, tokens: int) -> list[int]:
        """So many tokens in as few rows as they fit."""
        whole, rest = divmod(tokens, self._longest)
        return [self._longest] * whole + [rest] * bool(rest)

    def _step(
        self,
        lengths: list[int],
        lanes: list[int],
        voice: list[LanePages],
        sampling: Sampling = GREEDY,
        *,
        scores: bool = False,
    ) -> Step:
        """A new request in each row."""
        number = next(self._ids)
        chunks = [
            Chunk(
                row=row,
                generation=number,
                start=0,
                length=length,
                lane=lanes[row % len(lanes)],
                tokens=[0] * length,
                pages=[0] * -(-length // self._capacity.page_size),
                scores=scores,
            )
            for row, length in enumerate(lengths)
        ]
        new_rows = [
            NewRow(row=row, generation=number, prompt_length=length, sampling=sampling, history=[0] * length)
            for row, length in enumerate(lengths)
        ]
        return Step(epoch=0, id=number, lanes=voice, new_rows=new_rows, chunks=chunks)


def _voices(pages: RankPagePool | None, capacity: Capacity) -> list[list[LanePages]]:
    """Lanes that steps go through: none; one of a page a group; all, of one page and of as many as can be.

    Groups that keep a step from being recorded are left out at first, and then tried too.
    """
    if pages is None or not pages.page_counts:
        return [[]]
    lanes = range(1, capacity.max_loras + 1)
    longest = max(1, min(capacity.max_lane_pages, max(pages.page_counts.values())))
    groups = [group for group, number in pages.page_counts.items() if number]
    usual = [group for group in groups if group not in UNRECORDED]
    voices = [[], [LanePages(1, _pages(pages, usual, 1))]]
    voices += [[LanePages(lane, _pages(pages, usual, held)) for lane in lanes] for held in sorted({1, longest})]
    if usual != groups:
        voices.append([LanePages(lane, _pages(pages, groups, longest)) for lane in lanes])
    return voices


def _pages(pages: RankPagePool, groups: list[str], held: int) -> dict[str, list[tuple[int, float]]]:
    """The first pages of these groups; of vector and matrix slots one."""
    slots = (vectors_of(""), full_weights_of(""))
    counts = {group: 1 if group.endswith(slots) else min(held, pages.page_counts[group]) for group in groups}
    return {group: [(page, 1.0) for page in range(count)] for group, count in counts.items()}


def _powers(most: int) -> list[int]:
    """1, 2, 4, .. and `most` itself."""
    return [*(1 << bit for bit in range(most.bit_length()) if 1 << bit < most), most]


@contextmanager
def _pretending(pages: RankPagePool | None) -> Iterator[None]:
    """While entered, every rank page and vector slot is said to be in use at all of its sites."""
    if pages is None:
        yield
        return
    _say(pages, PAGE_RANK)
    try:
        yield
    finally:
        _say(pages, 0)


def _say(pages: RankPagePool, units: int) -> None:
    for pool in pages.pools.values():
        pool.units_PS[...] = units
    for vectors in pages.vectors.values():
        vectors.held_V[...] = units > 0
    pages.version += 1
