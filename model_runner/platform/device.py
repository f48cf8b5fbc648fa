"""Device, dtype, threads, memory, and copies between host and device. Does not depend on models.

On a CPU, `--dtype auto` chooses bfloat16 only if the processor multiplies it (AMX or AVX512_BF16): otherwise it is
emulated and slower than float32.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from engine.errors import ConfigError

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
CPU_INFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
MEMORY_INFO = Path("/proc/meminfo")


def resolve_device(name: str) -> torch.device:
    """Returns the device that `--device` selects. Raises ConfigError if `name` is cuda and no CUDA device is usable."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: no CUDA device is usable here; use --device cpu or check the driver")
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda and name != "cpu" else torch.device("cpu")


def resolve_dtype(name: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype that `--dtype` selects.

    auto selects the checkpoint's dtype; on a CPU, float32 unless the checkpoint is bfloat16 and the processor
    multiplies bfloat16.
    """
    if name != "auto":
        dtype = DTYPES[name]
        if dtype is torch.bfloat16 and device.type == "cpu" and not cpu_has_bfloat16():
            log.warning("--dtype bfloat16: this processor has neither AMX nor AVX512_BF16; float32 would be faster")
        return dtype
    if device.type != "cpu":
        return checkpoint
    return torch.bfloat16 if checkpoint is torch.bfloat16 and cpu_has_bfloat16() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the dtype's name as flags spell it, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    return any(BF16_FLAGS & set(line.partition(":")[2].split()) for line in lines if line.startswith("flags"))


def set_threads(count: int | None = None) -> None:
    """Sets the number of torch's threads to `count`.

    None: keeps OMP_NUM_THREADS if it is set; otherwise uses all cores, or all but one if there are more than four.
    """
    if count is not None:
        torch.set_num_threads(count)
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(cores if cores <= 4 else cores - 1)


def upload(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Returns the array as a tensor on `device`, without waiting. On a CPU the tensor shares the array's memory.

    For CUDA the array is copied to pinned memory of torch's host allocator, which reuses a block only when the copy
    from it is done.
    """
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def upload_into(values: NDArray[Any], into: torch.Tensor) -> None:
    """Copies the array into `into`, a tensor of the same shape on the device, without waiting, as `upload` does."""
    host = torch.from_numpy(values)
    into.copy_(host.pin_memory() if into.is_cuda else host, non_blocking=True)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """Starts a copy to the host and returns it.

    The copy of a CUDA tensor may be read once a `DeviceEvent` that was created after this call is done.
    """
    return tensor.to("cpu", non_blocking=True)


class DeviceEvent:
    """A point in the current CUDA stream that the host can query or wait for; on a CPU it is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def is_done(self) -> bool:
        """Whether all work that was launched before the event is done."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Waits until all work that was launched before the event is done."""
        if self._event is not None:
            self._event.synchronize()


def device_memory(device: torch.device) -> tuple[int, int]:
    """Returns (total, free) bytes of the device's memory; for a CPU, those of `host_memory`."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    return host_memory()


def host_memory() -> tuple[int, int]:
    """Returns (total, free) bytes of memory of the machine, or of its container if that has a limit.

    Reclaimable page cache counts as free.
    """
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in _lines(MEMORY_INFO))}
    total, free = kib["MemTotal"] << 10, kib["MemAvailable"] << 10
    limit = _number(CGROUP / "memory.max")
    if limit is None:
        return total, free
    reclaimable = {name: int(size) for name, size in (line.split() for line in _lines(CGROUP / "memory.stat"))}
    used = (_number(CGROUP / "memory.current") or 0) - reclaimable.get("inactive_file", 0)
    return min(total, limit), min(free, max(0, limit - used))


def _number(path: Path) -> int | None:
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
