"""Results in one JSON file for each card and day, written after every point, so that an interrupted run is resumed.

Does not interpret the numbers.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy")


class Results:
    """A results file; `data` is its content."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if self.data.get("about") != about:
            self.data = {"about": about}

    def section(self, name: str) -> dict[str, Any]:
        """Returns a part of the results. The caller changes it and then calls `save`."""
        part: dict[str, Any] = self.data.setdefault(name, {})
        return part

    def save(self) -> None:
        """Writes the file through a temporary one, so that it is never incomplete."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def about(card: str) -> dict[str, Any]:
    """Returns the facts that the results depend on: the date, the card, and versions of Python and packages."""
    versions = {package: _version(package) for package in PACKAGES}
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"date": today, "card": card, "python": platform.python_version(), **versions}


def file_name(facts: dict[str, Any]) -> str:
    """Returns the file name, such as `gpu-2026-01-31-nvidia-h100.json`."""
    card = re.sub(r"[^a-z0-9]+", "-", str(facts["card"]).lower()).strip("-")
    return f"gpu-{facts['date']}-{card}.json"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
