"""The columns of the kernel benchmark: a name, and a function that prepares a case, or the reason for its absence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from gpu.case import Case, Run
from gpu.columns import ours
from gpu.columns import sglang as sglang_columns
from gpu.columns import vllm as vllm_column


@dataclass(frozen=True)
class Column:
    """One column. `absent` is the reason why it cannot be measured, if there is one."""

    name: str
    prepare: Callable[[Case], Run]
    peer: bool = False
    absent: str = ""


OURS = ("csgmv", "triton")


def columns(peers: Path) -> list[Column]:
    """Returns our columns, and those of the peers whose files are under `peers` (see `fetch`)."""
    found = [Column(name, partial(ours.run, name)) for name in OURS]
    sglang, vllm = _missing(peers, sglang_columns), _missing(peers, vllm_column)
    if not sglang:
        sglang_columns.install(peers)
    if not vllm:
        vllm_column.install(peers)
    found += [
        Column(f"sglang {run.__name__}", run, True, sglang)
        for run in (sglang_columns.csgmv, sglang_columns.triton, sglang_columns.triton_v2)
    ]
    return [*found, Column("vllm", vllm_column.punica, True, vllm)]


def _missing(peers: Path, module: ModuleType) -> str:
    lost = [name for name in module.FILES if not (peers / name).exists()]
    return f"{lost[0]} is not under {peers}: run with --fetch-peers where pip works" if lost else ""
