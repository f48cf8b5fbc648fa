"""Sizes such as 2GiB, and the errors for invalid sizes."""

from __future__ import annotations

import pytest

from engine.config.sizes import has_unit, parse_bytes
from engine.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("2GiB", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5 kb", 1500),
        ("3 KiB", 3072),
        ("7B", 7),
        ("1TiB", 1 << 40),
    ],
)
def test_size_is_parsed_to_bytes(text: str, count: int) -> None:
    assert parse_bytes(text, "--flag") == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "0", "0.0001B", "1 2 GB", "1XB", "nan", "1e3"])
def test_bad_size_names_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--flag"):
        parse_bytes(text, "--flag")


def test_bare_number_has_no_unit() -> None:
    assert not has_unit(" 12 ")
    assert has_unit("12GiB")
    assert has_unit("1.5")
