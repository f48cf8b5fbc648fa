"""Quotes and clips names and values from an adapter's files, for one-line errors."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


def quoted_name(name: str) -> str:
    """Returns the name of a tensor, a module or a file, quoted and clipped."""
    return repr(name if len(name) <= 200 else name[:197] + "...")


def some(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    shown = ", ".join(quoted_name(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def quoted_value(value: object) -> str:
    """Returns the value of an option as JSON, clipped."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
