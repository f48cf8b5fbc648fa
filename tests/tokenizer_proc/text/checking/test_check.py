"""Tokenizer files are parsed in another process first: equal ones are known, and one that takes too much is refused."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path

import pytest
from fixtures.models import small_tokenizers

from engine.errors import ConfigError, StorageFailed
from tokenizer_proc.text.checking import check
from tokenizer_proc.text.checking.check import checked
from tokenizer_proc.text.checking.check_worker import described

RAW = small_tokenizers.byte_level().to_str().encode()


def test_formatting_does_not_change_what_is_found() -> None:
    found, other = described(RAW), described(json.dumps(json.loads(RAW), indent=4).encode())
    assert found == other
    assert not found.refused
    assert b"merges" not in found.small
    assert json.loads(found.small)["added_tokens"] == json.loads(RAW)["added_tokens"]


def test_a_change_of_a_small_part_keeps_the_model() -> None:
    saved = json.loads(RAW)
    saved["post_processor"] = None
    found, base = described(json.dumps(saved).encode()), described(RAW)
    assert found.model == base.model
    assert found.content != base.content
    saved["model"]["merges"].pop()
    assert described(json.dumps(saved).encode()).model != base.model


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"\xff", b"[" * 200_000, b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}']
)
def test_a_file_that_is_no_tokenizer_is_refused(raw: bytes) -> None:
    assert described(raw).refused


def test_the_process_finds_the_same(tmp_path: Path) -> None:
    assert checked(RAW, "x") == described(RAW)
    with pytest.raises(ConfigError, match=r"x/tokenizer\.json cannot be read: "):
        checked(b"{}", "x/tokenizer.json")


def test_a_check_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "WALL_SECONDS", 0.001)
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read: parsing it was stopped, as it may take"):
        checked(RAW, "tokenizer.json")


def test_a_server_without_descriptors_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(StorageFailed, match="Too many open files"):
        checked(RAW, "tokenizer.json")
