"""Results as one JSON file a card and day, written after every point, so that a run that was cut short goes on.

Knows nothing of what the numbers mean.
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
    """The file; `data` is its content."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if self.data.get("about") != about:
            self.data = {"about": about}

    def section(self, name: str) -> dict[str, Any]:
        """A part of the results, to be written into; `save` after that."""
        part: dict[str, Any] = self.data.setdefault(name, {})
        return part

    def save(self) -> None:
        """To the file, by way of another, so that it is never half a file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def about(card: str) -> dict[str, Any]:
    """What the results depend on."""
    versions = {package: _version(package) for package in PACKAGES}
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"date": today, "card": card, "python": platform.python_version(), **versions}


def file_name(facts: dict[str, Any]) -> str:
    """`gpu-2026-01-31-nvidia-h100.json`."""
    card = re.sub(r"[^a-z0-9]+", "-", str(facts["card"]).lower()).strip("-")
    return f"gpu-{facts['date']}-{card}.json"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
