"""Parses the weights of tenants on the command line: `alice=2`."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from engine.errors import ConfigError


def parse_weights(items: Sequence[str], flag: str) -> dict[str, float]:
    """Returns the weight (> 0) of each tenant. Raises a ConfigError that names `flag`."""
    weights: dict[str, float] = {}
    for item in items:
        name, _, text = item.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not name or not (isfinite(weight) and weight > 0):
            raise ConfigError(f"{flag} {item}: write TENANT=WEIGHT with a weight above 0")
        if name in weights:
            raise ConfigError(f"{flag} {item}: {name} is given twice")
        weights[name] = weight
    return weights
