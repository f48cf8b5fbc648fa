"""A compiler that hangs, for tests that builders and runners still end."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def hanging_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes $CXX a compiler that never ends; returns the file that it writes its process id to."""
    pid_file, script = tmp_path / "pid", tmp_path / "c++"
    script.write_text(f"#!/bin/sh\necho $$ > {pid_file}.new && mv {pid_file}.new {pid_file}\nexec sleep 1000\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    return pid_file
