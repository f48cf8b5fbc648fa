"""The processes of a launched engine, by /proc: which run, and how much memory they hold together."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PROCESSES = ("model_runner", "scheduler", "tokenizer_proc")


def runs(pid: int) -> bool:
    """Returns whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> dict[str, int]:
    """Returns the ids of the engine's running processes, by module."""
    found: dict[str, int] = {}
    for child in descendants(pid)[1:]:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            for name in PROCESSES:
                if name.encode() in words and name not in found:
                    found[name] = child
    return found


def descendants(pid: int) -> list[int]:
    """Returns the process and all its descendants, parents first."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def descriptors(pid: int) -> int:
    """Returns the number of open descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory(pid: int) -> int:
    """Returns the resident bytes of the whole engine; pages that processes share count once."""
    total = 0
    for process in descendants(pid):
        with contextlib.suppress(OSError, IndexError):
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += int(text.split("\nPss:")[1].split()[0]) << 10
    return total
