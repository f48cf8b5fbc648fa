"""Five minutes of all attacks beside another tenant's streams: all promises hold.

The attackers' answers, the victim's tokens and gaps, and the memory are checked by the script itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.alone]

ROOT = Path(__file__).resolve().parents[3]


def test_no_attack_hurts_another_tenant(tmp_path: Path) -> None:
    figures, log = tmp_path / "figures.json", tmp_path / "server.log"
    flags = ["--minutes", "5", "--json", str(figures), "--log", str(log)]
    command = [sys.executable, "scripts/attack.py", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + log.read_text()[-2000:]
    phases = json.loads(figures.read_text())["phases"]
    assert len(phases["attack"]["kinds"]) > 30  # of the some fifty kinds, in a random order
    assert phases["attack"]["streams"]["answered"] > 100
