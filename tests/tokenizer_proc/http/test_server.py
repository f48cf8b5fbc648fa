"""The HTTP server warns at start if other machines can load adapters without an admin key."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fixtures.serving.tokenizer_front import config

from tokenizer_proc.http.server import warn_of_open_loads


@pytest.mark.parametrize(
    ("fields", "warns"),
    [
        ({"runtime_loads": True, "server_info": {"host": "0.0.0.0"}}, True),
        ({"runtime_loads": True, "server_info": {"host": "::"}}, True),
        ({"runtime_loads": True, "server_info": {"host": "10.0.0.7"}}, True),
        ({"runtime_loads": True, "server_info": {"host": "127.0.0.1"}}, False),
        ({"runtime_loads": True, "server_info": {"host": "localhost"}}, False),
        ({"runtime_loads": True, "server_info": {"host": "0.0.0.0"}, "admin_key": "k"}, False),
        ({"runtime_loads": False, "server_info": {"host": "0.0.0.0"}}, False),
    ],
)
def test_open_loads_are_warned_of(fields: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_open_loads(config("sql", **fields))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warns
    assert ("--admin-api-key" in caplog.text) is warns
