"""A compiler that hangs, for builders and runners that must not."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def hanging_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a compiler that never ends, and is the only one, writes its process id."""
    told, script = tmp_path / "told", tmp_path / "c++"
    script.write_text(f"#!/bin/sh\necho $$ > {told}.new && mv {told}.new {told}\nexec sleep 1000\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    return told
