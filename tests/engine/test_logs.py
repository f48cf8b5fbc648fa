"""A log record stays on one line and its values stay in place, whatever characters a client put into them."""

from __future__ import annotations

import json
import logging
import re

import pytest

from engine import logs


def test_pairs_are_key_equals_value() -> None:
    line = logs.pairs(id="a-1", status=400, none=None, seconds=0.00149, message="no such thing", empty="")
    assert line == 'id=a-1 status=400 seconds=0.001 message="no such thing" empty=""'


@pytest.mark.parametrize("evil", ["a\nb", "a status=200", 'a" status="200', "\x1b[2J", "é", "\u2028", "a=b", "\\"])
def test_hostile_value_stays_one_value(evil: str) -> None:
    line = logs.pairs(id=evil, status=400)
    assert line.isascii()
    assert line.isprintable()
    found = re.fullmatch(r'id=("(?:[^"\\]|\\.)*") status=400', line)
    assert found
    assert json.loads(found[1]) == evil


def test_long_values_are_cut() -> None:
    assert logs.pairs(message="x" * 100_000) == "message=" + "x" * 197 + "..."


@pytest.mark.parametrize(("level", "shown"), [("debug", 2), ("info", 1), ("warning", 0)])
def test_log_lines_name_process_and_level(level: str, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        logs.setup("tokenizer", level)
        logging.getLogger("somebody").info("call %s", "id=1")
        logging.getLogger("somebody").debug("more")
        lines = capsys.readouterr().err.splitlines()
    finally:
        root.handlers[:], root.level = before
    assert len(lines) == shown
    assert all(re.match(r"\d\d:\d\d:\d\d [ID] tokenizer: ", line) for line in lines)
