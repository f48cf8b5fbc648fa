"""Process configs derived from flags: LoRA on or off, paths, pool sizes, run-time loads, policies, buffers."""

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
)
from engine.config.resolve import resolve
from engine.config.server_args import ServerArgs
from engine.errors import ConfigError

ENDPOINTS = Endpoints(tokenizer="ipc://t", scheduler="ipc://s", runner="ipc://r", zmq_server="ipc://d")
ADAPTER = AdapterSource(adapter_id=1, name="a", path="p", root="/p")


def _resolve(adapters: list[AdapterSource] | None = None, **flags: object) -> ProcessConfigs:
    return resolve(
        ServerArgs(**flags),
        endpoints=ENDPOINTS,
        model=Path("/m"),
        adapters=adapters or [],
        listen_fd=5,
    )


def test_process_configs_round_trip_through_json() -> None:
    resolved = _resolve([ADAPTER], lora_pool_size="1GiB", lora_root=["x"])
    for config, type_ in zip(
        (resolved.tokenizer, resolved.scheduler, resolved.runner),
        (TokenizerConfig, SchedulerConfig, RunnerConfig),
        strict=True,
    ):
        assert msgspec.json.decode(msgspec.json.encode(config), type=type_) == config


def test_roots_are_real_paths_with_the_hub_cache_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    roots = _resolve(lora_root=[str(tmp_path / "link"), "~/more", str(tmp_path / "real")]).tokenizer.lora_roots
    assert roots == [str(tmp_path / name) for name in ("real", "more", "hub")]
    assert _resolve().tokenizer.lora_roots == []


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
def test_lora_is_on_with_adapters_or_a_lora_flag(
    flags: dict[str, object], adapters: list[AdapterSource], lanes: int
) -> None:
    resolved = _resolve(adapters, **flags)
    assert resolved.tokenizer.max_loras == resolved.scheduler.max_loras == resolved.runner.max_loras == lanes
    assert resolved.runner.enable_lora == bool(lanes)
    assert resolved.tokenizer.max_pinned == max(0, lanes - 1)


def test_tokenizer_path_is_the_models_or_its_own() -> None:
    assert _resolve().tokenizer.tokenizer_path == "/m"
    own = resolve(
        ServerArgs(),
        endpoints=ENDPOINTS,
        model=Path("/m"),
        tokenizer=Path("/t"),
        adapters=[],
        listen_fd=5,
    )
    assert (own.tokenizer.tokenizer_path, own.tokenizer.model_path, own.runner.model_path) == ("/t", "/m", "/m")


def test_names_of_the_model_reach_two_processes() -> None:
    resolved = _resolve(served_model_name=["a", "b"])
    assert resolved.tokenizer.served_model_names == resolved.runner.served_model_names == ["a", "b"]


def test_lora_pool_size_is_adapters_or_bytes() -> None:
    assert _resolve(lora_pool_size="12").runner.lora_pool_adapters == 12
    assert _resolve(lora_pool_size="12MB").runner.lora_pool_bytes == 12_000_000
    for bad in ("0", "lots", "-3"):
        with pytest.raises(ConfigError, match="--lora-pool-size"):
            _resolve(lora_pool_size=bad)


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
def test_runtime_loads_are_open_on_loopback_or_by_flag(flags: dict[str, object], open_: bool) -> None:
    assert _resolve(**flags).tokenizer.runtime_loads is open_


@pytest.mark.parametrize(
    ("flags", "rights"),
    [
        ({}, "open"),
        ({"admin_api_key": "k"}, "open"),
        ({"api_key": ["k"]}, "hide-adapters"),
        ({"api_key": ["k"], "metrics_rights": "open"}, "open"),
        ({"metrics_rights": "operator"}, "operator"),
    ],
)
def test_metrics_hide_adapters_where_there_are_keys(flags: dict[str, object], rights: str) -> None:
    assert _resolve(**flags).tokenizer.metrics_rights == rights


def test_admin_key_is_not_in_server_info() -> None:
    resolved = _resolve(admin_api_key="secret")
    assert resolved.tokenizer.admin_key == "secret"
    assert "secret" not in str(resolved.tokenizer.server_info)


def test_schedule_policy_reaches_scheduler_and_tokenizer() -> None:
    fair = _resolve(schedule_policy="fair", tenant_weights=["a=2"])
    assert (fair.scheduler.schedule_policy, fair.scheduler.tenant_weights) == ("fair", {"a": 2.0})
    assert not fair.tokenizer.priorities
    assert _resolve(schedule_policy="priority").tokenizer.priorities
    with pytest.raises(ConfigError, match="--tenant-weights a=0"):
        _resolve(schedule_policy="fair", tenant_weights=["a=0"])


def test_stream_buffer_and_stall_timeout_are_parsed() -> None:
    tokenizer = _resolve(max_stream_buffer="256KiB", stream_stall_timeout=2.5).tokenizer
    assert (tokenizer.max_stream_buffer, tokenizer.stream_stall_timeout) == (256 << 10, 2.5)
    assert (_resolve().tokenizer.max_stream_buffer, _resolve().tokenizer.stream_stall_timeout) == (4 << 20, 60.0)
    with pytest.raises(ConfigError, match="--max-stream-buffer much"):
        _resolve(max_stream_buffer="much")
    with pytest.raises(ConfigError, match="--stream-stall-timeout"):
        _resolve(stream_stall_timeout=0.0)


def test_request_memory_is_bounded_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _resolve(max_request_memory="1GiB").tokenizer.max_request_memory == 1 << 30
    for machine, expected in ((8 << 30, 1 << 30), (1 << 40, 2 << 30)):
        monkeypatch.setattr("engine.config.resolve.machine_bytes", lambda machine=machine: machine)
        assert _resolve().tokenizer.max_request_memory == expected
    for bad in ("much", "1MiB"):
        with pytest.raises(ConfigError, match=f"--max-request-memory {bad}"):
            _resolve(max_request_memory=bad)


def test_limits_on_connections_reach_the_tokenizer() -> None:
    tokenizer = _resolve(max_connections=10, max_connections_per_address=3, read_timeout=2.5).tokenizer
    assert (tokenizer.max_connections, tokenizer.max_connections_per_address, tokenizer.read_timeout) == (10, 3, 2.5)
    for flag in ("max_connections", "max_connections_per_address", "read_timeout"):
        with pytest.raises(ConfigError, match=flag.replace("_", "-")):
            _resolve(**{flag: 0})
