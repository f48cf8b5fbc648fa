"""Tile sizes of the attention kernel, chosen from a model's sizes for a GPU or for triton's interpreter.

They do not depend on a step's lengths, so a new step never compiles a kernel, and launches can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_runner.compute.kernels.triton.target import INTERPRETER

MAX_SPLITS = 64
WAVES = 2  # programs per multiprocessor: keys are cut into spans until there are this many
MIN_DECODE_SPLITS = 4  # the most spans are at least this many, so that one long decode does not run alone at the end


@dataclass(frozen=True)
class Shape:
    """One variant of the kernel: a tile of `queries` x `heads` padded to `rows`, with `keys` keys at a time."""

    queries: int
    heads: int
    rows: int
    keys: int
    warps: int
    stages: int


def power_of_2(value: int) -> int:
    """Returns the smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()


def padded_head(head_dim: int) -> int:
    """Returns the head size that kernels compute with: a power of two, at least 16 for tensor cores."""
    return max(16, power_of_2(head_dim))


def decode_shape(group: int, head_dim: int, itemsize: int, capability: int) -> Shape:
    """Returns the shape for decodes, with one query in a tile.

    Decodes are bound by reading K and V, so tiles are small and many run at once.
    """
    heads = min(group, 64)
    rows = max(16, power_of_2(heads))
    if capability == INTERPRETER:
        return Shape(1, heads, rows, 64, 4, 1)
    key_bytes = padded_head(head_dim) * itemsize  # 256 for heads of 128 in bfloat16
    keys, stages = (64, 3) if key_bytes <= 256 else (32, 2)
    return Shape(1, heads, rows, keys, 8 if itemsize == 4 and key_bytes > 256 else 4, stages)


def prefill_shape(group: int, head_dim: int, itemsize: int, capability: int) -> Shape:
    """Returns the shape for prefills, with many queries in a tile.

    Prefills are bound by tensor cores, so tiles have as many rows as registers hold. Tensor cores of Hopper and
    datacenter Blackwell read from shared memory (and tensor memory), those of other GPUs from registers.
    """
    key_bytes = padded_head(head_dim) * itemsize
    if capability == INTERPRETER:
        rows, keys, warps, stages = 64, 64, 4, 1
    elif itemsize == 4:
        rows, keys, warps, stages = 32, 32, 8, 1
    elif key_bytes <= 256:
        rows, keys, warps, stages = 128, 64 if 90 <= capability < 120 else 32, 8, 3
    else:
        rows, keys, warps, stages = 64, 32, 8, 2
    heads = min(group, rows)
    return Shape(rows // heads, heads, rows, keys, warps, stages)


def parts(group: int, shape: Shape) -> int:
    """Returns the number of programs that share the query heads of one key/value head."""
    return -(-group // shape.heads)


def splits(tiles: int, programs: int, shape: Shape, processors: int) -> int:
    """Returns the most spans that a tile's keys are cut into: enough to fill the device and to balance long rows.

    `programs` is the number of programs for a span of a tile: one for each key/value head, or several if `parts` is
    more than 1. Prefills that fill the device without cutting are not cut.
    """
    to_fill = WAVES * processors // (tiles * programs)
    floor = MIN_DECODE_SPLITS if shape.queries == 1 and processors > 1 else 1
    return min(MAX_SPLITS, max(to_fill, floor))
