"""Where and in what numbers the runner computes: device, dtype, threads, memory. Knows nothing of models.

On a CPU, bfloat16 is chosen by itself only where the processor multiplies it (AMX or AVX512_BF16): elsewhere it is
emulated and slower than float32.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from engine.errors import ConfigError

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
CPU_INFO = Path("/proc/cpuinfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def resolve_device(name: str) -> torch.device:
    """The device that `--device` means. Raises ConfigError when cuda is asked for and there is none."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError("--device cuda: no CUDA device is usable here; use --device cpu or check the driver")
    return torch.device("cuda", torch.cuda.current_device()) if found and name != "cpu" else torch.device("cpu")


def resolve_dtype(name: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that `--dtype` means: auto is the checkpoint's, and float32 on a CPU that cannot multiply it."""
    if name != "auto":
        dtype = DTYPES[name]
        if dtype is torch.bfloat16 and device.type == "cpu" and not cpu_has_bfloat16():
            log.warning("--dtype bfloat16: this processor has neither AMX nor AVX512_BF16; float32 would be faster")
        return dtype
    if device.type != "cpu":
        return checkpoint
    return torch.bfloat16 if checkpoint is torch.bfloat16 and cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    return any(BF16_FLAGS & set(line.partition(":")[2].split()) for line in lines if line.startswith("flags"))


def set_threads() -> None:
    """All cores up to four, then all but one; OMP_NUM_THREADS, where it is set, is left alone."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(cores if cores <= 4 else cores - 1)


def memory(device: torch.device) -> tuple[int, int]:
    """(total, free) bytes of the device; on a CPU, of the machine or of the container that limits it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    limit = _container_limit()
    return (total, free) if limit is None else (min(total, limit), min(free, limit))


def _container_limit() -> int | None:
    try:
        text = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
