"""A machine profile: the measured costs of steps, fills and loads, and the machine's limits.

step    base + decode_row * rows + prefill_token * tokens + context_token * (KV tokens read)
             + lane * (lanes in the step) + lane_byte * (bytes of their rank pages)
fill    seconds + bytes / bytes_per_second, from host memory to rank pages
load    the same formula, from disk to host memory; `loaders` loads at a time
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.errors import ConfigError
from engine.messages import Capacity, Footprint

UNITS = 16  # LoRA rank units in a rank page


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class StepCost(_Part, frozen=True, kw_only=True):
    """The cost of one step: the seconds that each part of its contents adds."""

    base: float
    decode_row: float = 0.0
    prefill_token: float = 0.0
    context_token: float = 0.0
    lane: float = 0.0
    lane_byte: float = 0.0


class CopyCost(_Part, frozen=True, kw_only=True):
    """The cost of one copy: constant seconds, and a part that is proportional to its bytes."""

    seconds: float = 0.0
    bytes_per_second: float

    def of(self, size: int) -> float:
        return self.seconds + size / self.bytes_per_second


class MachineLimits(_Part, frozen=True, kw_only=True):
    """What fits into the machine's memory, and the limits that it was launched with."""

    rows: int
    kv_tokens: int
    max_length: int
    max_batched_tokens: int
    max_lora_rank: int
    page_size: int = 16
    host_bytes: int = 0


class Profile(_Part, frozen=True, kw_only=True):
    """The costs and limits of one machine with one model."""

    name: str
    source: str
    step: StepCost
    fill: CopyCost
    load: CopyCost
    room: MachineLimits
    unit_bytes: dict[str, int]  # bytes of one unit of LoRA rank, by group
    lora_ranks: list[int]  # LoRA ranks of the adapters; each adapter gets one by the hash of its name
    loaders: int = 2
    fill_share: float = 0.0  # the part of a step's time that fills may take after the step; 0: fills run beside it
    gap: float = 0.0  # seconds between two steps; a second step in flight hides them

    def capacity(self, *, max_loras: int, pool_adapters: int) -> Capacity:
        """Returns the runner's capacity with rank pages for `pool_adapters` adapters of the largest LoRA rank."""
        limits, pages = self.room, -(-self.room.max_lora_rank // UNITS)
        return Capacity(
            kv_pages=limits.kv_tokens // limits.page_size,
            page_size=limits.page_size,
            rows=limits.rows,
            max_length=limits.max_length,
            max_batched_tokens=limits.max_batched_tokens,
            vocab_size=1 << 20,
            max_loras=max_loras,
            rank_pages=dict.fromkeys(self.unit_bytes, pages * pool_adapters),
            max_lora_rank=limits.max_lora_rank,
            max_lane_pages=2 * pages,
            device="cpu" if self.fill_share else "cuda",  # on a CPU fills and steps take turns
            rank_page_bytes={group: UNITS * size for group, size in self.unit_bytes.items()},
            host_bytes=limits.host_bytes,
        )

    def footprint(self, rank: int) -> Footprint:
        """Returns the footprint of an adapter with LoRA rank `rank` at all sites."""
        return Footprint(dict.fromkeys(self.unit_bytes, -(-rank // UNITS)))

    def adapter_bytes(self, rank: int) -> int:
        """Returns the bytes of an adapter with LoRA rank `rank` on the host; a fill copies all of them."""
        return rank * sum(self.unit_bytes.values())


def read(path: Path) -> Profile:
    """Reads a profile. Raises ConfigError if the file is missing or invalid."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not profile.lora_ranks or max(profile.lora_ranks) > profile.room.max_lora_rank or min(profile.lora_ranks) < 1:
        raise ConfigError(f"{path}: `lora_ranks` must be from 1 to room.max_lora_rank ({profile.room.max_lora_rank})")
    return profile
