"""Quotes and clips names and values from an adapter's files, for one-line errors."""

from __future__ import annotations

import msgspec


def quoted_name(name: str) -> str:
    """Returns the name of a tensor, a module or a file, quoted and clipped."""
    return repr(name if len(name) <= 200 else name[:197] + "...")


def quoted_value(value: object) -> str:
    """Returns the value of an option as JSON, clipped."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
