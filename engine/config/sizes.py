"""Parses sizes such as `2GiB`, `500 MB`, `1073741824`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from engine.errors import ConfigError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}iB".upper(): 1024**power for power, prefix in enumerate("KMGT", start=1)}
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str, flag: str) -> int:
    """Returns the size in bytes (>= 1). Raises a ConfigError that names the flag."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{flag} {text}: expected a size such as 2GiB, 500MB or a number of bytes")
    count = int(float(match[1]) * unit)
    if count < 1:
        raise ConfigError(f"{flag} {text}: must be more than nothing")
    return count


def has_unit(text: str) -> bool:
    """Returns whether `text` has a unit; a flag may take a number without a unit as a count instead of bytes."""
    return not text.strip().isdigit()


def machine_bytes() -> int:
    """Returns the bytes of memory of the machine, or of its container if that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
