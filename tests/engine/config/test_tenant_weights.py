"""Weights of tenants on the command line."""

from __future__ import annotations

import pytest

from engine.config.tenant_weights import parse_weights
from engine.errors import ConfigError


def test_weights_are_parsed_by_tenant() -> None:
    assert parse_weights(["a=2", "b=0.5", "c=d=1"], "--tenant-weights") == {"a": 2.0, "b": 0.5, "c=d": 1.0}
    assert parse_weights([], "--tenant-weights") == {}


@pytest.mark.parametrize("item", ["a", "=2", "a=", "a=0", "a=-1", "a=nan", "a=inf", "a=two"])
def test_bad_weight_names_the_flag(item: str) -> None:
    with pytest.raises(ConfigError, match="--tenant-weights"):
        parse_weights([item], "--tenant-weights")


def test_tenant_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_weights(["a=1", "a=2"], "--tenant-weights")
