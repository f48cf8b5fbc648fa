"""Device, dtype, memory and threads: what auto selects, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from model_runner.platform import device
from model_runner.platform.device import resolve_device, resolve_dtype

CPU = torch.device("cpu")


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that replaces /proc/cpuinfo."""
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(device, "CPU_INFO", info)
    return info


@pytest.mark.parametrize(
    ("flags", "checkpoint", "expected"),
    [
        ("sse2 amx_bf16 avx512f", torch.bfloat16, torch.bfloat16),
        ("sse2 avx512_bf16", torch.bfloat16, torch.bfloat16),
        ("sse2 avx512f avx2", torch.bfloat16, torch.float32),
        ("sse2 amx_bf16", torch.float16, torch.float32),
        ("sse2 amx_bf16", torch.float32, torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu(processor: Path, flags: str, checkpoint: torch.dtype, expected: torch.dtype) -> None:
    processor.write_text(f"model name\t: amx_bf16 in a name\nflags\t\t: {flags}\n")
    assert resolve_dtype("auto", checkpoint, CPU) is expected


def test_auto_dtype_on_cuda_is_the_checkpoints(processor: Path) -> None:
    processor.write_text("flags : sse2\n")
    assert resolve_dtype("auto", torch.float16, torch.device("cuda")) is torch.float16
    assert resolve_dtype("float16", torch.float32, CPU) is torch.float16
    assert resolve_dtype("bfloat16", torch.float32, CPU) is torch.bfloat16


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(ConfigError, match="--device cuda"):
        resolve_device("cuda")


def test_memory_is_measured_within_the_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total, free = device.device_memory(CPU)
    assert 0 < free <= total
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("123456\n")
    assert device.device_memory(CPU) == (123456, 123456)
    (tmp_path / "memory.current").write_text("23456\n")
    (tmp_path / "memory.stat").write_text("anon 3456\ninactive_file 3456\n")
    assert device.device_memory(CPU) == (123456, 123456 - 20000)
    (tmp_path / "memory.max").write_text("max\n")
    assert device.device_memory(CPU)[0] > 10**8


@pytest.mark.parametrize(
    ("count", "environment", "cores", "expected"),
    [
        (3, {"OMP_NUM_THREADS": "7"}, 16, [3]),
        (None, {"OMP_NUM_THREADS": "7"}, 16, []),
        (None, {}, 4, [4]),
        (None, {}, 16, [15]),
    ],
)
def test_threads_follow_the_flag_the_environment_the_cores(
    count: int | None,
    environment: dict[str, str],
    cores: int,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(device.os, "environ", environment)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(cores)))
    device.set_threads(count)
    assert threads == expected
