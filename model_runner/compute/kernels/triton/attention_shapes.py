"""How attention is cut into programs: pure functions of a model's sizes, for a GPU or for triton's interpreter.

Nothing here depends on a step's lengths, so a launch never compiles anew and may be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_runner.compute.kernels.triton.target import INTERPRETER

MOST_SPLITS = 64
WAVES = 2  # programs for each multiprocessor that are worth cutting rows for
SKEW = 4  # a long decode among many is cut at least this often


@dataclass(frozen=True)
class Shape:
    """One variant of the kernel: a tile of `queries` x `heads` in `rows`, `keys` at a time."""

    queries: int
    heads: int
    rows: int
    keys: int
    warps: int
    stages: int


def power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()


def padded_head(head_dim: int) -> int:
    """The head size that kernels compute with: a power of two, and enough for tensor cores."""
    return max(16, power_of_2(head_dim))


def decode_shape(group: int, head_dim: int, itemsize: int, capability: int) -> Shape:
    """Tiles of one query: bound by reading K and V, so small, and many of them beside one another."""
    heads = min(group, 64)
    rows = max(16, power_of_2(heads))
    if capability == INTERPRETER:
        return Shape(1, heads, rows, 64, 4, 1)
    wide = padded_head(head_dim) * itemsize  # bytes of a padded key: 256 for 128 in bfloat16
    keys, stages = (64, 3) if wide <= 256 else (32, 2)
    return Shape(1, heads, rows, keys, 8 if itemsize == 4 and wide > 256 else 4, stages)


def prefill_shape(group: int, head_dim: int, itemsize: int, capability: int) -> Shape:
    """Tiles of many queries: bound by tensor cores, so as many rows as registers hold.

    Hopper and the large Blackwell multiply from shared memory (their own, for the results), the others from registers.
    """
    wide = padded_head(head_dim) * itemsize
    if capability == INTERPRETER:
        rows, keys, warps, stages = 64, 64, 4, 1
    elif itemsize == 4:
        rows, keys, warps, stages = 32, 32, 8, 1
    elif wide <= 256:
        rows, keys, warps, stages = 128, 64 if 90 <= capability < 120 else 32, 8, 3
    else:
        rows, keys, warps, stages = 64, 32, 8, 2
    heads = min(group, rows)
    return Shape(rows // heads, heads, rows, keys, warps, stages)


def parts(group: int, shape: Shape) -> int:
    """Programs that share the query heads of one key/value head."""
    return -(-group // shape.heads)


def splits(tiles: int, programs: int, shape: Shape, processors: int) -> int:
    """Into how many spans a tile may be cut: enough to fill the device, and to allow for skew.

    `programs` is how many a tile has, one for each (part of a) key/value head. Prefills that fill it are not cut.
    """
    filling = WAVES * processors // (tiles * programs)
    floor = SKEW if shape.queries == 1 and processors > 1 else 1
    return min(MOST_SPLITS, max(filling, floor))
