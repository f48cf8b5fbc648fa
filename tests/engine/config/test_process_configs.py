"""From flags to sections: what follows from what."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.config.process_configs import (
    AdapterSource,
    Endpoints,
    ProcessConfigs,
    RunnerConfig,
    SchedulerConfig,
    TokenizerConfig,
    sections,
)
from engine.config.server_args import ServerArgs
from engine.errors import ConfigError

ENDPOINTS = Endpoints(tokenizer="ipc://t", scheduler="ipc://s", runner="ipc://r", zmq_server="ipc://d")
ADAPTER = AdapterSource(adapter_id=1, name="a", path="p", root="/p")


def _sections(adapters: list[AdapterSource] | None = None, **flags: object) -> ProcessConfigs:
    return sections(
        ServerArgs(**flags),
        endpoints=ENDPOINTS,
        journal=Path("/j"),
        model=Path("/m"),
        adapters=adapters or [],
        listen_fd=5,
    )


def test_sections_survive_their_journey() -> None:
    resolved = _sections([ADAPTER], lora_pool_size="1GiB", lora_root=["x"])
    for section, type_ in zip(
        (resolved.tokenizer, resolved.scheduler, resolved.runner),
        (TokenizerConfig, SchedulerConfig, RunnerConfig),
        strict=True,
    ):
        assert msgspec.json.decode(msgspec.json.encode(section), type=type_) == section


@pytest.mark.parametrize(
    ("flags", "adapters", "lanes"),
    [
        ({}, [], 0),
        ({}, [ADAPTER], 8),
        ({"enable_lora": True}, [], 8),
        ({"enable_lora": False}, [], 0),
        ({"max_lora_rank": 8, "max_loras_per_batch": 3}, [], 3),
        ({"lora_pool_size": "4"}, [], 8),
    ],
)
def test_lora_is_on_when_something_means_it(
    flags: dict[str, object], adapters: list[AdapterSource], lanes: int
) -> None:
    resolved = _sections(adapters, **flags)
    assert resolved.tokenizer.max_loras == resolved.scheduler.max_loras == resolved.runner.max_loras == lanes
    assert resolved.runner.enable_lora == bool(lanes)
    assert resolved.tokenizer.max_pinned == max(0, lanes - 1)


def test_the_tokenizer_is_the_models_or_its_own() -> None:
    assert _sections().tokenizer.tokenizer_path == "/m"
    own = sections(
        ServerArgs(),
        endpoints=ENDPOINTS,
        journal=Path("/j"),
        model=Path("/m"),
        tokenizer=Path("/t"),
        adapters=[],
        listen_fd=5,
    )
    assert (own.tokenizer.tokenizer_path, own.tokenizer.model_path, own.runner.model_path) == ("/t", "/m", "/m")


def test_the_pool_is_adapters_or_bytes() -> None:
    assert _sections(lora_pool_size="12").runner.lora_pool_adapters == 12
    assert _sections(lora_pool_size="12MB").runner.lora_pool_bytes == 12_000_000
    for bad in ("0", "lots", "-3"):
        with pytest.raises(ConfigError, match="--lora-pool-size"):
            _sections(lora_pool_size=bad)


@pytest.mark.parametrize(
    ("flags", "open_"),
    [
        ({}, True),
        ({"host": "127.0.0.5"}, True),
        ({"host": "::1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "10.0.0.1"}, False),
        ({"host": "0.0.0.0", "port": None}, True),
        ({"host": "0.0.0.0", "allow_runtime_lora_updating": True}, True),
    ],
)
def test_run_time_loads_are_open_on_loopback_or_by_flag(flags: dict[str, object], open_: bool) -> None:
    assert _sections(**flags).tokenizer.runtime_loads is open_


def test_a_key_is_not_shown() -> None:
    resolved = _sections(admin_api_key="secret")
    assert resolved.tokenizer.admin_key == "secret"
    assert "secret" not in str(resolved.tokenizer.server_info)


def test_the_policy_reaches_the_scheduler_and_the_door() -> None:
    fair = _sections(schedule_policy="fair", tenant_weights=["a=2"])
    assert (fair.scheduler.schedule_policy, fair.scheduler.tenant_weights) == ("fair", {"a": 2.0})
    assert not fair.tokenizer.priorities
    assert _sections(schedule_policy="priority").tokenizer.priorities
    with pytest.raises(ConfigError, match="--tenant-weights a=0"):
        _sections(schedule_policy="fair", tenant_weights=["a=0"])


def test_what_may_wait_for_a_client() -> None:
    tokenizer = _sections(max_stream_buffer="256KiB", stream_stall_timeout=2.5).tokenizer
    assert (tokenizer.max_stream_buffer, tokenizer.stream_stall_timeout) == (256 << 10, 2.5)
    assert (_sections().tokenizer.max_stream_buffer, _sections().tokenizer.stream_stall_timeout) == (4 << 20, 60.0)
    with pytest.raises(ConfigError, match="--max-stream-buffer much"):
        _sections(max_stream_buffer="much")
    with pytest.raises(ConfigError, match="--stream-stall-timeout"):
        _sections(stream_stall_timeout=0.0)
