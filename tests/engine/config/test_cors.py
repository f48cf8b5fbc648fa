"""The flags about cross-origin calls."""

from __future__ import annotations

import pytest

from engine.config.cors import Cors, parse_cors
from engine.config.flags.parser import parse
from engine.errors import ConfigError


def test_words_and_json_lists_are_the_same() -> None:
    words = parse_cors(["https://a.org", "http://b:8080"], ["POST"], [], True)
    lists = parse_cors(['["https://a.org", "http://b:8080"]'], ['["POST"]'], ['["*"]'], True)
    assert words == lists == Cors(origins=["https://a.org", "http://b:8080"], methods=["POST"], credentials=True)
    assert parse_cors([], [], [], False) == Cors()


@pytest.mark.parametrize(
    "flags",
    [
        ["--allowed-origins", "example.org"],
        ["--allowed-origins", "https://example.org/path"],
        ["--allowed-origins", "[1]"],
        ["--allowed-origins", "["],
        ["--allowed-origins", "*", "--allowed-methods", "GET, POST"],
        ["--allow-credentials"],
        ["--allowed-headers", "X-Key"],
    ],
)
def test_flags_that_mean_nothing_are_refused(flags: list[str]) -> None:
    args = parse(flags)
    with pytest.raises(ConfigError, match="--allow"):
        parse_cors(args.allowed_origins, args.allowed_methods, args.allowed_headers, args.allow_credentials)
