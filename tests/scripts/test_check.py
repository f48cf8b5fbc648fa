"""scripts/check names the steps that failed and returns a failure. Fakes replace the tools of the steps."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("ruff", "mypy", "lint-imports", "python")


def check(directory: Path, *arguments: str, failing: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the script in a directory whose tools do nothing, except that the tool `failing` fails."""
    (directory / "scripts").mkdir()
    tools = directory / ".venv" / "bin"
    tools.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "check", directory / "scripts")
    for path in (directory / "scripts" / "setup", *(tools / tool for tool in TOOLS)):
        path.write_text(f'#!/bin/sh\necho "ran {path.name} $@"\nexit {int(path.name == failing)}\n')
        path.chmod(0o755)
    command = [str(directory / "scripts" / "check"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ})


def test_check_passes_when_all_steps_pass(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ok: types" in done.stdout
    assert "fast tests" not in done.stdout


@pytest.mark.parametrize(("tool", "step"), [("mypy", "types"), ("lint-imports", "import contracts")])
def test_check_names_the_step_that_failed(tool: str, step: str, tmp_path: Path) -> None:
    done = check(tmp_path, failing=tool)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"scripts/check failed: {step}"
    assert "ok: rooms and links" in done.stdout  # the other steps ran


def test_check_runs_the_fast_tests_on_request(tmp_path: Path) -> None:
    done = check(tmp_path, "--fast-tests")
    assert done.returncode == 0
    assert "not slow and not e2e and not gpu" in done.stdout
    assert "ok: fast tests" in done.stdout


def test_check_refuses_unknown_arguments(tmp_path: Path) -> None:
    assert check(tmp_path, "--fast").returncode == 2
