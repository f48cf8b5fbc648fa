"""Finds the adapters below a directory: trainers write checkpoint-57, or global_step_10/actor/lora_adapter."""

from __future__ import annotations

import os
import re
from pathlib import Path

CONFIG_NAME = "adapter_config.json"
DEEPEST = 3
MOST_DIRECTORIES = 500
"""The most directories that are looked into."""


def adapters_below(top: Path) -> list[str]:
    """Returns the directories under `top` that hold an adapter, the latest step first.

    Links are not followed, and directories that cannot be read are left out.
    """
    found: list[str] = []
    level, seen = [top], 0
    for _ in range(DEEPEST):
        level = [below for directory in level for below in _directories(directory)][: MOST_DIRECTORIES - seen]
        seen += len(level)
        found += [str(directory) for directory in level if (directory / CONFIG_NAME).is_file()]
    return sorted(found, key=_steps, reverse=True)


def _directories(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _steps(path: str) -> list[int]:
    """Returns the numbers in the path: those of training steps grow."""
    return [int(number) for number in re.findall(r"\d{1,15}", path)]
