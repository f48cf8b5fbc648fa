"""All kinds of attack. Importing this package registers them."""

from attacks.kinds import (
    adapter_calls,
    adapter_files,
    bodies,
    clients,
    connections,
    faults,
    fields,
    rates,
    raw_http,
    rights,
    texts,
)

__all__ = [
    "adapter_calls",
    "adapter_files",
    "bodies",
    "clients",
    "connections",
    "faults",
    "fields",
    "rates",
    "raw_http",
    "rights",
    "texts",
]  # fmt: skip
