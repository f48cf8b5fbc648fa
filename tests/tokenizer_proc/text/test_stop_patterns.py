"""Expressions that end an output: found where a search of the whole text finds them, at a bounded cost."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from tokenizer_proc.text import stop_patterns
from tokenizer_proc.text.stop_patterns import StopPatterns, check_patterns

EXPRESSIONS = ["a+b", "^b", "ba$", r"\bab\b", "(a|ab)(c|bcd)", "[^a]c", "é.", "(?i)AB", r"\Ac"]


def ends_after(finder: StopPatterns, pieces: list[str]) -> int | None:
    """Returns the number of pieces after which an expression matched."""
    return next((number for number, piece in enumerate(pieces, start=1) if finder.push(piece)), None)


@given(st.sampled_from(EXPRESSIONS), st.lists(st.text(alphabet="abcé ", max_size=4), max_size=10))
def test_a_match_is_found_with_the_piece_that_completes_it(expression: str, pieces: list[str]) -> None:
    expected = next((n for n in range(1, len(pieces) + 1) if re.search(expression, "".join(pieces[:n]))), None)
    assert ends_after(StopPatterns([expression]), pieces) == expected


def test_the_first_of_several_expressions_is_named() -> None:
    finder = StopPatterns(["x", "[0-9]+\\."])
    assert ends_after(finder, ["Step", " 12", ". x"]) == 3
    assert finder.matched == "x"
    assert finder.push("more")


def test_a_long_text_is_searched_in_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_patterns, "WINDOW", 8)
    for expression, last, expected in (
        ("^z", "z", None),
        (r"\bz", "z", None),
        (r"\bz", " z", 101),
        ("y{8}z", "z", None),
    ):
        assert ends_after(StopPatterns([expression]), ["y"] * 100 + [last]) == expected
    finder = StopPatterns(["y{7}z"])
    assert ends_after(finder, ["y"] * 100 + ["z"]) == 101
    assert len(finder._tail) == 9


@pytest.mark.parametrize(
    "expression",
    ["", "(", "a*", "^", "$", "(?=a)", r"(a)\1", "a{1001}", "(a{100}){100}", "x" * 257, "[^a]{200}\\pL{100}", "\ud800"],
)
def test_expressions_that_cannot_be_served_are_refused(expression: str) -> None:
    with pytest.raises(InvalidRequest, match="stop_regex") as refusal:
        check_patterns([expression])
    assert refusal.value.param == "stop_regex"
    assert len(refusal.value.message) < 500


def test_too_many_expressions_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most 8"):
        check_patterns(["a"] * 9)


@pytest.mark.parametrize("expression", ["(x+x+)+y", "(a|aa)+$b", "(.*)*!"])
def test_hostile_expressions_are_searched_in_linear_time(expression: str) -> None:
    """Python's `re` would not end within the age of the universe."""
    if expression == "(.*)*!":
        assert ends_after(StopPatterns([expression]), ["x" * 50] * 200) is None
        return
    assert ends_after(StopPatterns([expression]), ["x" * 500, "a" * 500] * 20) is None
