"""Names and values from an adapter's files, quoted and clipped: fit for one line of an error."""

from __future__ import annotations

import msgspec


def quoted_name(name: str) -> str:
    """The name of a tensor, a module or a file."""
    return repr(name if len(name) <= 200 else name[:197] + "...")


def quoted_value(value: object) -> str:
    """The value of an option, as JSON."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
