"""Runs synthetic steps before the first request, so that every kernel variant is compiled before Ready.

    lanes     the base | one lane of one page | all lanes, with one page and with the most pages of a lane
    sizes     1, 2, 4, .. rows that decode | 1, 2, 4, .. tokens of prefill | both together
    sampling  greedy, drawn, filtered, penalised, with log-probabilities of tokens and prompts

All rows use KV page 0, which is scratch, and rank pages of zeros whose units are marked as used, so the outputs are
meaningless. The runner is reset afterwards. No kernel is called directly: the steps of all shapes launch them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from tqdm import tqdm

from engine.messages import Capacity, Chunk, LanePages, NewRow, Sampling, Step
from engine.processes.busy_timer import BusyTimer
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
    Sampling(temperature=0.0, allowed_token_ids=[0, 1], bad_words=[[0, 1]], logprobs=0, token_ids_logprob=[0]),
)
NOT_CAPTURED = (EXPERTS, full_weights_of(EMBED))
"""Groups whose use by a lane prevents a step from being captured as a CUDA graph."""

SAMPLED_ROWS = 32
"""The most rows in the steps that cover the kinds of sampling."""


def warm_up(runner: Runner, *, progress: BusyTimer | None = None) -> None:
    """Executes all warm-up steps. The runner must not have served a request yet; it is reset at the end."""
    maker = StepMaker(runner.capacity)
    pages = runner.adapters.pages
    with _full_units(pages):
        steps = [step for lanes in _lane_sets(pages, runner.capacity) for step in maker.sizes(lanes)]
        steps += [maker.sampled(sampling) for sampling in SAMPLINGS]
        steps.append(maker.scored())
        for step in tqdm(steps, desc="warm-up", disable=progress is None, leave=False):
            if progress is not None:
                progress.tick()
            runner.execute(step)
    runner.reset()


class StepMaker:
    """Creates steps over rows 0, 1, ..., with a new request in each row."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._ids = count(1)

    def sizes(self, lanes: list[LanePages]) -> Iterator[Step]:
        """Yields decode, prefill and mixed steps of all sizes; the rows use `lanes` in turn (empty: the base)."""
        rows, most = self._capacity.rows, self._capacity.max_batched_tokens
        for number in _powers_of_two(min(rows, most)):
            yield self._step([1] * number, lanes)
        for tokens in _powers_of_two(min(most, rows * self._longest)):
            yield self._step(self._split(tokens), lanes)
        both = [*self._split(max(1, min(most, self._longest) // 2)), 1, 1][:rows]
        yield self._step(both if sum(both) <= most else [1], lanes)

    def sampled(self, sampling: Sampling) -> Step:
        """Returns a step of some rows that all have these sampling parameters."""
        number = min(SAMPLED_ROWS, self._capacity.rows, self._capacity.max_batched_tokens)
        return self._step([1] * number, [], sampling)

    def scored(self) -> Step:
        """Returns a step with a prompt whose log-probabilities are computed."""
        length = max(1, min(8, self._longest, self._capacity.max_batched_tokens))
        return self._step([length], [], Sampling(temperature=0.0, prompt_logprobs=1), scores=length > 1)

    @property
    def _longest(self) -> int:
        """The length of the longest chunk after which a row still has room for a token."""
        return max(1, self._capacity.max_length - 1)

    def _split(self, tokens: int) -> list[int]:
        """Splits `tokens` tokens over as few rows as possible and returns the length of each row."""
        whole, rest = divmod(tokens, self._longest)
        return [self._longest] * whole + [rest] * bool(rest)

    def _step(
        self,
        lengths: list[int],
        lanes: list[LanePages],
        sampling: Sampling = GREEDY,
        *,
        scores: bool = False,
    ) -> Step:
        number, used = next(self._ids), [lane.lane for lane in lanes] or [0]
        chunks = [
            Chunk(
                row=row,
                generation=number,
                start=0,
                length=length,
                lane=used[row % len(used)],
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
        return Step(epoch=0, id=number, lanes=lanes, new_rows=new_rows, chunks=chunks)


def _lane_sets(pages: RankPagePool | None, capacity: Capacity) -> list[list[LanePages]]:
    """Returns the sets of lanes that steps use.

    These are no lanes, one lane with one page of each group, all lanes with one page, and all lanes with the most pages
    a lane may have. They leave out the NOT_CAPTURED groups; if the pool has any of these, one more set includes them.
    """
    if pages is None or not pages.page_counts:
        return [[]]
    lanes = range(1, capacity.max_loras + 1)
    longest = max(1, min(capacity.max_lane_pages, max(pages.page_counts.values())))
    groups = [group for group, number in pages.page_counts.items() if number]
    captured = [group for group in groups if group not in NOT_CAPTURED]
    sets = [[], [LanePages(1, _first_pages(pages, captured, 1))]]
    sets += [[LanePages(lane, _first_pages(pages, captured, held)) for lane in lanes] for held in sorted({1, longest})]
    if captured != groups:
        sets.append([LanePages(lane, _first_pages(pages, groups, longest)) for lane in lanes])
    return sets


def _first_pages(pages: RankPagePool, groups: list[str], held: int) -> dict[str, list[tuple[int, float]]]:
    """Returns the first `held` pages of each group, or its first slot, each with its scale."""
    slots = (vectors_of(""), full_weights_of(""))
    counts = {group: 1 if group.endswith(slots) else min(held, pages.page_counts[group]) for group in groups}
    return {group: [(page, 1.0) for page in range(count)] for group, count in counts.items()}


def _powers_of_two(most: int) -> list[int]:
    """Returns 1, 2, 4, ... below `most`, and `most` itself."""
    return [*(1 << bit for bit in range(most.bit_length()) if 1 << bit < most), most]


@contextmanager
def _full_units(pages: RankPagePool | None) -> Iterator[None]:
    """Marks every rank page and vector slot as used at all of its sites, for the duration of the `with` block."""
    if pages is None:
        yield
        return
    _set_units(pages, PAGE_RANK)
    try:
        yield
    finally:
        _set_units(pages, 0)


def _set_units(pages: RankPagePool, units: int) -> None:
    for pool in pages.pools.values():
        pool.units_PS[...] = units
    for vectors in pages.vectors.values():
        vectors.held_V[...] = units > 0
    pages.version += 1
