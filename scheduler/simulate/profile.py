"""What things cost on one machine, as measured: steps, fills, loads, and what it can hold. Simulates nothing.

step    base + decode_row * rows + prefill_token * tokens + context_token * (KV tokens read)
             + lane * (lanes in the step) + lane_byte * (bytes of their rank pages)
fill    seconds + bytes / bytes_per_second, host memory to rank pages
load    the same, disk to host memory, by `loaders` at a time
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
    """Seconds of one step, by what is in it."""

    base: float
    decode_row: float = 0.0
    prefill_token: float = 0.0
    context_token: float = 0.0
    lane: float = 0.0
    lane_byte: float = 0.0


class CopyCost(_Part, frozen=True, kw_only=True):
    """Seconds of one copy of so many bytes."""

    seconds: float = 0.0
    bytes_per_second: float

    def of(self, size: int) -> float:
        return self.seconds + size / self.bytes_per_second


class Room(_Part, frozen=True, kw_only=True):
    """What the machine holds."""

    rows: int
    kv_tokens: int
    max_length: int
    max_batched_tokens: int
    max_lora_rank: int
    page_size: int = 16
    host_bytes: int = 0


class Profile(_Part, frozen=True, kw_only=True):
    """One machine with one model.

    `unit_bytes`: by group, what one LoRA rank unit takes. `lora_ranks`: those of the adapters, dealt out by name.
    `fill_share`: the share of a step's time that fills may take after it; 0 means that they go on beside the steps, on
    their own. `gap`: seconds from a step's end to the next one's begin that a second step in flight hides.
    """

    name: str
    source: str
    step: StepCost
    fill: CopyCost
    load: CopyCost
    room: Room
    unit_bytes: dict[str, int]
    lora_ranks: list[int]
    loaders: int = 2
    fill_share: float = 0.0
    gap: float = 0.0

    def capacity(self, *, max_loras: int, pool_adapters: int) -> Capacity:
        """What the runner would say of itself, with a pool for so many adapters of the largest rank."""
        room, pages = self.room, -(-self.room.max_lora_rank // UNITS)
        return Capacity(
            kv_pages=room.kv_tokens // room.page_size,
            page_size=room.page_size,
            rows=room.rows,
            max_length=room.max_length,
            max_batched_tokens=room.max_batched_tokens,
            vocab_size=1 << 20,
            max_loras=max_loras,
            rank_pages=dict.fromkeys(self.unit_bytes, pages * pool_adapters),
            max_lora_rank=room.max_lora_rank,
            max_lane_pages=2 * pages,
            device="cpu" if self.fill_share else "cuda",  # that is where copies take turns with the steps
            rank_page_bytes={group: UNITS * size for group, size in self.unit_bytes.items()},
            host_bytes=room.host_bytes,
        )

    def footprint(self, rank: int) -> Footprint:
        """The pages of an adapter on all sites."""
        return Footprint(dict.fromkeys(self.unit_bytes, -(-rank // UNITS)))

    def adapter_bytes(self, rank: int) -> int:
        """What an adapter takes on the host, and its fill copies."""
        return rank * sum(self.unit_bytes.values())


def read(path: Path) -> Profile:
    """Reads a profile. Raises ConfigError that says what is wrong in it."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not profile.lora_ranks or max(profile.lora_ranks) > profile.room.max_lora_rank or min(profile.lora_ranks) < 1:
        raise ConfigError(f"{path}: `lora_ranks` must be from 1 to room.max_lora_rank ({profile.room.max_lora_rank})")
    return profile
