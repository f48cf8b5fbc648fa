"""API keys from flags, environment and files; and the errors for invalid lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.api_keys import ApiKey, read_keys
from engine.errors import ConfigError


def test_keys_come_from_flags_and_environment() -> None:
    assert read_keys([], None, {}) == []
    found = read_keys(["a", "b"], None, {"CHORUS_API_KEY": "c, d", "VLLM_API_KEY": "a"})
    assert [one.key for one in found] == ["a", "b", "c", "d"]


def test_key_file_has_rules_by_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text(
        '# ours\n{"key": "a", "tenant": "t", "adapters": ["t-*"], "tokens_per_minute": 100}\n\n'
        '{"key": "b", "operator": true}\n'
    )
    assert read_keys([], str(file), {}) == [
        ApiKey(key="a", tenant="t", adapters=["t-*"], tokens_per_minute=100),
        ApiKey(key="b", operator=True),
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no key"),
        ("secret", "line 1"),
        ('{"tenant": "t"}', "line 1: Object missing required field `key`"),
        ('{"key": "a"}\n{"key": "a"}', "given twice"),
        ('{"key": "a", "adapter": ["x"]}', "unknown field `adapter`"),
        ('{"key": "a", "tokens_per_minute": 0}', "tokens_per_minute must be at least 1"),
        ('{"key": "a", "requests_per_minute": 0.5}', "requests_per_minute must be at least 1"),
        ('{"key": "a", "operator": true, "adapters": ["x"]}', "an operator may use every model"),
        ('{"key": "a", "operator": true, "base": false}', "an operator may use every model"),
        ('{"key": "a", "operator": 1}', "line 1"),
        ('{"key": "two words"}', "printable ASCII without spaces"),
    ],
)
def test_bad_key_file_is_a_one_line_error(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_keys([], str(file), {})
    assert "\n" not in caught.value.message
    assert "secret" not in caught.value.message
