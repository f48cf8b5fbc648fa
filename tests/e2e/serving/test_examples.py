"""The examples of all documents run unchanged against the demo.

A `python` or `sh` block is run, unless a comment above it says `<!-- not run: why -->`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.documents.pages import ROOT, Block, blocks, pages
from fixtures.serving.running import RunningServer

from engine.config.flags.parser import parse

pytestmark = pytest.mark.e2e

BLOCKS = [block for page in pages() for block in blocks(page)]
EXAMPLES = [block for block in BLOCKS if block.language in ("python", "sh") and block.is_run]
COMMANDS = [line for block in BLOCKS if block.language == "sh" for line in block.text.replace("\\\n", "").splitlines()]
LAUNCHES = [
    found[1] for line in COMMANDS if (found := re.match(r"(?:scripts/run|python -m engine\.launch)\b(.*)", line))
]
SCRIPTS = [line for line in COMMANDS if re.match(r"python (-m scheduler|scripts/)", line)]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


@pytest.fixture(scope="module")
def demo() -> Iterator[RunningServer]:
    with RunningServer() as server:
        yield server


def run(command: list[str], **environment: str) -> str:
    """Runs a command and returns its stdout; fails if the command does."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", EXAMPLES, ids=[block.name for block in EXAMPLES])
def test_example_runs(block: Block, demo: RunningServer) -> None:
    text = block.text.replace("http://127.0.0.1:30000", demo.url)
    program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    printed = run([*program, text], XDG_CACHE_HOME=os.devnull)
    assert printed.strip()
    assert '"error"' not in printed
    if "France" in text:
        assert "Paris" in printed


def test_examples_show_every_api() -> None:
    text = "\n".join(block.text for block in EXAMPLES)
    for word in ("curl", "aiohttp", "OpenAI(", "asyncio.gather", "lora_path", "Engine(", "LoRARequest("):
        assert word in text


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_line_is_parsed(line: str) -> None:
    parse(line.split("#")[0].split())


@pytest.mark.parametrize("line", SCRIPTS)
def test_script_line_has_only_flags_of_the_script(line: str) -> None:
    words = line.split("#")[0].split()
    end = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    script = words[1:3] if words[1] == "-m" else words[1:2]
    # the workload argument of make_trace.py
    commands = [word for word in words[len(script) + 1 : end] if word.isalpha()]
    flags = [word for word in words if word.startswith("--")]
    known = re.findall(r"--[a-z0-9-]+", run([sys.executable, *script, *commands, "--help"]))
    assert set(flags) <= set(known)
