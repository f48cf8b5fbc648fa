"""Stop strings are found wherever the text is cut; no part of one is sent, and no text is held longer than needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tokenizer_proc.text.stops import StopFinder

LETTERS = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4)


def slow(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Searches character by character for the first position where a stop string ends; the longest one there wins."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def feed(finder: StopFinder, text: str, cuts: list[int]) -> str:
    out, at = "", 0
    for cut in [*cuts, len(text)]:
        out += finder.push(text[at : at + cut])
        at += cut
    return out


@given(LETTERS, STOPS, st.booleans(), st.lists(st.integers(0, 5), max_size=12))
def test_matches_do_not_depend_on_the_increments(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    finder = StopFinder(stops, include)
    out = feed(finder, text, cuts) + finder.flush()
    assert (out, finder.matched) == slow(text, stops, include)


@given(LETTERS, STOPS)
def test_text_that_may_begin_a_stop_string_is_held(text: str, stops: list[str]) -> None:
    finder = StopFinder(stops)
    out = finder.push(text)
    if finder.matched is None:
        held = text[len(out) :]
        assert out + held == text
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_text_after_a_match_is_dropped() -> None:
    finder = StopFinder(["END"])
    assert finder.push("the E") == "the "
    assert finder.push("ND of it") == ""
    assert finder.matched == "END"
    assert finder.push("more") == ""
    assert finder.flush() == ""


def test_text_passes_at_once_without_stop_strings() -> None:
    finder = StopFinder([])
    assert finder.push("abc") == "abc"
    assert finder.flush() == ""
