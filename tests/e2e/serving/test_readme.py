"""The README's examples run as they stand, against the demo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.serving.running import RunningServer

from engine.config.flags import parse

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
EXAMPLES = [(kind, text) for kind, text in BLOCKS if kind == "python" or text.startswith("curl")]


@pytest.fixture(scope="module")
def demo() -> Iterator[RunningServer]:
    with RunningServer() as server:
        yield server


@pytest.mark.parametrize(("kind", "text"), EXAMPLES, ids=[text.splitlines()[0][:40] for _, text in EXAMPLES])
def test_an_example_runs(kind: str, text: str, demo: RunningServer) -> None:
    text = text.replace("http://127.0.0.1:30000", demo.url)
    command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": os.devnull},
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout, done.stdout


def test_there_are_examples_of_every_way_in() -> None:
    text = "\n".join(text for _, text in EXAMPLES)
    for word in ("curl", "aiohttp", "AsyncOpenAI", "asyncio.gather", "lora_path", "Engine("):
        assert word in text


def test_every_flag_stands_in_the_readme_and_no_other() -> None:
    from engine.config.flags import _parser

    known = {
        option for action in _parser()._actions for option in action.option_strings if action.help != "==SUPPRESS=="
    }
    table = set(re.findall(r"`(--[a-z-]+)", README.split("## Flags")[1].split("\n## ")[0]))
    aside = {"--help", "--no-enable-lora"}
    assert table - aside == {option for option in known if option.startswith("--")} - aside


@pytest.mark.parametrize("line", re.findall(r"^(?:scripts/run|python -m engine\.launch)( .*)?$", README, re.MULTILINE))
def test_every_command_line_of_the_readme_is_understood(line: str) -> None:
    parse(line.split("#")[0].replace("\\", "").split())
