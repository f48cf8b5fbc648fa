"""The LoRA kernels for an 8B model, compiled ahead of time for three generations of GPUs: no register spills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from fixtures.models.ahead_of_time import Compiled, compile_for

from model_runner.compute.kernels.triton.lora.expand import expand_kernel
from model_runner.compute.kernels.triton.lora.shrink import shrink_kernel
from model_runner.compute.kernels.triton.lora.tiling import ExpandTiling, expand_tiling, shrink_tiling

PROCESSORS = 132
TILES = (1, 4, 16, 64, 256)
TABLES = {"table": "*i32", "gather": "*i32", "site_units": "*i32"}


@dataclass(frozen=True)
class Shape:
    """A site of an 8B Llama: input size, output size, size of the widest slice, number of slices."""

    features: int
    outs: int
    widest: int
    slices: int


SITES = {
    "qkv": Shape(4096, 6144, 4096, 3),
    "o": Shape(4096, 4096, 4096, 1),
    "gate_up": Shape(4096, 28672, 14336, 2),
    "down": Shape(14336, 4096, 4096, 1),
    "head": Shape(4096, 128256, 128256, 1),
}


def variants(rows: int, most_pages: int) -> tuple[set[tuple[Any, ...]], set[tuple[ExpandTiling, int]]]:
    """The shrinks and expands that a server compiles for tiles of `rows` rows and lanes of `most_pages` pages."""
    shrinks, expands = set(), set()
    for site in SITES.values():
        for tiles in TILES:
            a = shrink_tiling(rows, site.features, site.slices, tiles, most_pages, 2, PROCESSORS)
            b = expand_tiling(rows, site.widest, site.outs, tiles, most_pages, 2, PROCESSORS)
            shrinks.add((a.rows, a.units, a.block, a.warps, a.stages))
            expands.add((b, a.splits))
    return shrinks, expands


def compile_shrink(
    capability: int, rows: int, units: int, block: int, warps: int, stages: int, dtype: str = "bf16"
) -> Compiled:
    numbers = ("items_at", "capacity", "tokens", "width", "x_stride", "features", "slices", "span")
    signature = {"x": f"*{dtype}", "a": f"*{dtype}", "h": "*fp32", **TABLES}
    return compile_for(
        shrink_kernel,
        signature | dict.fromkeys(numbers, "i32"),
        {"ROWS": rows, "UNITS_N": units, "BLOCK": block, "PDL": capability >= 90},
        capability,
        warps,
        stages,
        aligned=("x_stride", "features"),
    )


def compile_expand(capability: int, tiling: ExpandTiling, splits: int, kind: str, dtype: str = "bf16") -> Compiled:
    """Compiles an expand. `kind`: "plain", "vectors" (gains, biases, and a bias of the base) or "embedding"."""
    signature = {"y": f"*{dtype}", "b": f"*{dtype}", **TABLES}
    constants: dict[str, Any] = {"ROWS": tiling.rows, "BLOCK": tiling.block, "PAGES": tiling.pages, "SPLITS": splits}
    constants["PDL"] = capability >= 90 and kind != "embedding"
    numbers = ("items_at", "tiles_at", "slots_at", "capacity", "tokens", "width", "slices", "second", "third", "outs")
    signature |= dict.fromkeys((*numbers, "vocabulary"), "i32")
    optional = {
        "plain": {"h": "*fp32"},
        "vectors": {"h": "*fp32", "gain": "*fp32", "bias": "*fp32", "base_bias": f"*{dtype}"},
        "embedding": {"a": f"*{dtype}", "token_ids": "*i64"},
    }[kind]
    every = ("h", "a", "token_ids", "gain", "bias", "base_bias")
    return compile_for(
        expand_kernel,
        signature | optional,
        constants | {name: None for name in every if name not in optional},
        capability,
        tiling.warps,
        tiling.stages,
        aligned=("second", "third", "outs"),
        options={"maxnreg": tiling.registers} if tiling.registers else None,
    )


def largest(expands: set[tuple[ExpandTiling, int]]) -> tuple[ExpandTiling, int]:
    """Returns the variant that needs the most registers."""
    return max(expands, key=lambda expand: (expand[0].block, expand[1]))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_short_tiles_of_rank_64_compile_without_spills(capability: int) -> None:
    """Decodes use short tiles; with the default chunk size, prefills do too."""
    shrinks, expands = variants(16, 8)
    assert len(shrinks) + len(expands) < 16
    for shrink in shrinks:
        assert compile_shrink(capability, *shrink).spills == 0, shrink
    for expand in expands if capability == 90 else {largest(expands)}:
        assert compile_expand(capability, *expand, "plain").spills == 0, expand
    for kind in ("vectors", "embedding"):
        assert compile_expand(capability, *largest(expands), kind).spills == 0, kind


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_long_tiles_compile_without_spills(capability: int) -> None:
    shrinks, expands = variants(64, 8)
    widest = max(shrinks, key=lambda shrink: shrink[1])
    assert compile_shrink(capability, *widest).spills == 0, widest
    assert compile_expand(capability, *largest(expands), "plain").spills == 0, largest(expands)


def test_other_chunk_sizes_and_ranks_compile_for_hopper() -> None:
    for rows, most_pages in ((16, 2), (128, 8)):
        shrinks, expands = variants(rows, most_pages)
        widest = max(shrinks, key=lambda shrink: shrink[1])
        assert compile_shrink(90, *widest).spills == 0, widest
        assert compile_expand(90, *largest(expands), "plain").spills == 0, largest(expands)
