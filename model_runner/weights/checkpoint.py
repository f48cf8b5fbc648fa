"""Loads safetensors checkpoints of one or several files: copies each tensor into weights that are already allocated.

Every placement must be filled, and every tensor of the files must have a placement or be known as harmless. Does not
depend on layers.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from engine.directory import is_lfs_pointer, lfs_advice
from engine.errors import ConfigError
from engine.processes.busy_timer import BusyTimer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20
FLOATS = {"F64", "F32", "F16", "BF16"}
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)  # buffers in old checkpoints; the model computes them itself


@dataclass(frozen=True, eq=False)
class Placement:
    """The destination of a checkpoint tensor: the part `cut` of the tensor `name` is cast and copied into `into`.

    `shape` is the shape of the whole tensor, which the file must have.
    """

    name: str
    into: torch.Tensor
    shape: tuple[int, ...]
    cut: tuple[slice, ...]


def load_checkpoint(
    directory: Path, placements: Iterable[Placement], harmless: Iterable[str] = (), *, progress: BusyTimer | None = None
) -> None:
    """Fills every placement from the directory's checkpoint.

    `harmless` are names of tensors that the files may contain although no placement uses them. Raises ConfigError,
    which names the file and the tensor.
    """
    wanted: dict[str, list[Placement]] = {}
    for placement in placements:
        wanted.setdefault(placement.name, []).append(placement)
    files = checkpoint_files(directory)
    _check_fetched(files)
    missing = set(wanted)
    sizes = [file.stat().st_size for file in files]
    with tqdm(
        total=sum(sizes), desc="weights", unit="B", unit_scale=True, file=sys.stderr, disable=progress is None
    ) as bar:
        ends = itertools.accumulate(sizes)
        for file, end in zip(files, ends, strict=True):
            missing -= _load_file(file, wanted, missing, frozenset(harmless), bar, progress)
            bar.update(end - bar.n)  # also counts the file's header and skipped tensors
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConfigError(f"{directory}: the checkpoint has no tensor {min(missing)}{more}, which config.json asks for")


def _check_fetched(files: Iterable[Path]) -> None:
    """Raises ConfigError for a file that is a Git-LFS pointer."""
    for path in files:
        with path.open("rb") as file:
            if is_lfs_pointer(file):
                raise ConfigError(f"{path}: {lfs_advice(path.parent)}")


def checkpoint_files(directory: Path) -> list[Path]:
    """Returns the safetensors files of a model directory, sorted by name. Raises ConfigError if there are none."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        return _indexed_files(directory)
    others = sorted(file.name for file in directory.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if others:
        raise ConfigError(
            f"{directory}: only safetensors checkpoints are read, and there is {others[0]}. Convert it: "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes {SINGLE}"
        )
    raise ConfigError(f"{directory}: no {SINGLE} and no {INDEX}")


def _indexed_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ConfigError(f"{index} is larger than {MAX_INDEX_BYTES} bytes")
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({str(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} is not a safetensors index: {error!r}") from error
    for name in files:
        if Path(name).name != name or not (directory / name).is_file():
            raise ConfigError(f"{index} names {name!r}, which is not a file beside it")
    return [directory / name for name in files]


def _load_file(
    file: Path,
    wanted: dict[str, list[Placement]],
    missing: set[str],
    harmless: frozenset[str],
    bar: Any,
    progress: BusyTimer | None,
) -> set[str]:
    """Fills placements from one file. Returns the names of the tensors that were copied."""
    done: set[str] = set()
    try:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if progress is not None:
                    progress.tick()
                if name in wanted:
                    if name not in missing or name in done:
                        raise ConfigError(f"{file}: tensor {name} is in the checkpoint twice")
                    for placement in wanted[name]:
                        _copy(file, tensors.get_slice(name), placement, bar)
                    done.add(name)
                elif name not in harmless and not name.endswith(HARMLESS_SUFFIXES):
                    raise ConfigError(f"{file}: tensor {name} is not part of the model that config.json describes")
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a sound safetensors file: {error}") from error
    return done


def _copy(file: Path, source: Any, placement: Placement, bar: Any) -> None:
    """Fills one placement. Checks the tensor's shape and dtype before its values are read."""
    shape, kind = tuple(source.get_shape()), source.get_dtype()
    if shape != placement.shape:
        raise ConfigError(
            f"{file}: tensor {placement.name} has shape {list(shape)}, config.json asks for {list(placement.shape)}"
        )
    if kind not in FLOATS:
        raise ConfigError(f"{file}: tensor {placement.name} is of type {kind}; served are {', '.join(sorted(FLOATS))}")
    part = source[placement.cut]
    placement.into.copy_(part)
    if placement.into.dtype == torch.float16 and part.dtype != torch.float16 and not placement.into.isfinite().all():
        raise ConfigError(f"{file}: tensor {placement.name} does not fit into float16; use --dtype bfloat16 or float32")
    bar.update(part.numel() * part.element_size())
