"""Where and in what numbers the runner computes: device, dtype, threads, memory. Knows nothing of models.

On a CPU, bfloat16 is chosen by itself only where the processor multiplies it (AMX or AVX512_BF16): elsewhere it is
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


def dtype_name(dtype: torch.dtype) -> str:
    """As it is named in a flag."""
    return str(dtype).removeprefix("torch.")


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    return any(BF16_FLAGS & set(line.partition(":")[2].split()) for line in lines if line.startswith("flags"))


def set_threads(count: int | None = None) -> None:
    """So many threads compute on a CPU; None: as OMP_NUM_THREADS says, else all cores up to four, then all but one."""
    if count is not None:
        torch.set_num_threads(count)
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(cores if cores <= 4 else cores - 1)


def upload(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device; never waits for it. On a CPU the tensor and the array are one.

    On CUDA by way of pinned memory from torch's host allocator, which gives a block out again only when the copy that
    used it has run: a ring as long as what is in flight.
    """
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def send(values: NDArray[Any], into: torch.Tensor) -> None:
    """The array into a tensor of its shape on the device, without waiting, as `upload` does."""
    host = torch.from_numpy(values)
    into.copy_(host.pin_memory() if into.is_cuda else host, non_blocking=True)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on its way to the host; on CUDA it may be read once the stream has come so far (see `Arrival`)."""
    return tensor.to("cpu", non_blocking=True)


class Arrival:
    """A point in the device's work that the host can ask about or wait for; on a CPU it is there at once."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def there(self) -> bool:
        """Whether everything before it is done."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Returns when everything before it is done."""
        if self._event is not None:
            self._event.synchronize()


def memory(device: torch.device) -> tuple[int, int]:
    """(total, free) bytes of the device; on a CPU, of the machine or of the container that limits it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    return host_memory()


def host_memory() -> tuple[int, int]:
    """(total, free) bytes of the machine, or of the container that limits it. What can be reclaimed counts as free."""
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
