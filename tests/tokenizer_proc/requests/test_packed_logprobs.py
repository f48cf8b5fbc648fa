"""Packed log-probabilities: what was added comes back, in slices of bounded size, from any position on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import PositionLogprobs, TokenLogprob
from tokenizer_proc.requests import packed_logprobs
from tokenizer_proc.requests.packed_logprobs import PackedLogprobs, Position


def position(number: int, top: int) -> Position:
    if number == 0:
        return None
    tokens = [TokenLogprob(each, -0.5 * each, f"t{each}", [each]) for each in range(top + 1)]
    return PositionLogprobs(tokens[0], tokens[1:])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 7), max_size=12),
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(0, 90),
    st.integers(0, 9),
)
def test_slices_give_back_what_was_added(lengths: list[int], top: int, least: int, start: int, length: int) -> None:
    everything = [position(number, top) for number in range(sum(lengths))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_logprobs, "SLICE_ENTRIES", least)
        packed, added = PackedLogprobs(), 0
        for each in lengths:
            packed.add(everything[added : added + each])
            added += each
    assert len(packed) == len(everything)
    assert [one for some in packed.slices() for one in some] == everything
    assert [one for some in packed.slices(start) for one in some] == everything[start:]
    part = packed.slices(start, start + length)
    assert [one for some in part for one in some] == everything[start : start + length]


def test_slices_are_bounded_and_packed() -> None:
    packed = PackedLogprobs()
    for number in range(20_000):
        packed.add([position(number, 20)])
    sizes = [packed_logprobs.entries(some) for some in packed.slices()]
    assert sum(sizes) == 1 + 19_999 * 21
    assert max(sizes) <= packed_logprobs.SLICE_ENTRIES + 21
    assert 0 < packed.bytes < 25 * sum(sizes)


def test_a_check_ends_the_reading_between_slices() -> None:
    class Left(Exception):
        pass

    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 3:
            raise Left

    packed = PackedLogprobs(check)
    for number in range(5000):
        packed.add([position(number, 20)])
    with pytest.raises(Left):
        list(packed.slices())
    assert checks == 3
