"""An adapter in shared memory: it equals the written one when opened, its numbers are checked, and nothing leaks."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter
from fixtures.processes.resources import descriptors, shared_bytes

from engine.directory import Directory
from engine.errors import AdapterError
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.loading import shm_adapter
from model_runner.lora.loading.adapter_reader import AdapterReader
from model_runner.lora.loading.limits import Limits
from model_runner.lora.loading.shm_adapter import Manifest, Part, ShmAdapter

SITES = random_sites()
CATALOGUE = Catalogue(SITES)
TARGETS = ["q_proj", "v_proj", "down_proj"]
PART = Part("layers.0.o", 0, 4, 0, 512)  # A is 4 x 32 floats, B 4 x 24


def read_adapter(root: Path, sites: Catalogue = CATALOGUE, announce: Callable[[int], None] | None = None) -> ShmAdapter:
    adapters = AdapterReader(sites, torch.float32, Limits())
    with Directory(root) as directory:
        return adapters.read(adapters.survey(directory), announce=announce or (lambda _: None))


def test_opened_adapter_is_the_files_scaled(tmp_path: Path) -> None:
    tensors = plain_tensors(SITES, TARGETS, rank=5)
    root = write_adapter(tmp_path, tensors, target_modules=TARGETS, r=5, lora_alpha=10)
    manifest, deltas = read_adapter(root).open(CATALOGUE, torch.float32)
    assert manifest.cast_from == []
    seen = 0
    for site in SITES:
        for piece, delta in zip(site.slices, deltas.get(site.name, (None,) * 3), strict=False):
            name = f"base_model.model.{site.path}.{piece.module}"
            if f"{name}.lora_A.weight" in tensors:
                assert delta is not None
                assert torch.equal(delta.a, tensors[f"{name}.lora_A.weight"])
                assert torch.equal(delta.b, tensors[f"{name}.lora_B.weight"].t() * 2)
                assert delta.b.is_contiguous()
                seen += 2
            else:
                assert delta is None
    assert seen == len(tensors)


def test_dropped_memory_is_freed_and_descriptors_closed(tmp_path: Path) -> None:
    sites = random_sites(layers=2, hidden=1024, inner=2048)
    tensors = plain_tensors(sites, TARGETS, rank=64)
    root = write_adapter(tmp_path, tensors, target_modules=TARGETS, r=64)
    catalogue = Catalogue(sites)
    shared, opened = shared_bytes(), descriptors()
    read = read_adapter(root, catalogue)
    assert descriptors() == opened + 1
    _, deltas = read.open(catalogue, torch.float32)
    size = sum(tensor.nbytes for tensor in tensors.values())
    last = deltas["layers.1.down"][0]
    assert last is not None
    assert float(sum(delta.a.sum() for slices in deltas.values() for delta in slices if delta)) != 0
    assert shared_bytes() - shared >= size // 2
    assert descriptors() == opened
    del deltas
    assert last.a.isfinite().all()  # a single view keeps the memory mapped
    del last
    gc.collect()
    assert shared_bytes() <= shared


def make(parts: list[Part], tensors: int = 896, size: int | None = None) -> ShmAdapter:
    descriptor = shm_adapter.allocate(tensors)
    made = shm_adapter.seal(descriptor, tensors, Manifest("r", [], parts))
    return made if size is None else ShmAdapter(descriptor, size, made.manifest_bytes)


def test_valid_shm_adapter_opens() -> None:
    _, deltas = make([PART]).open(CATALOGUE, torch.float32)
    assert [delta.b.shape if delta else None for delta in deltas["layers.0.o"]] == [(4, 24)]


@pytest.mark.parametrize(
    "part",
    [
        Part("layers.9.o", 0, 4, 0, 512),
        Part("layers.0.o", 1, 4, 0, 512),
        Part("layers.0.o", -1, 4, 0, 512),
        Part("layers.0.o", 0, 0, 0, 576, gain=1 << 60),
        Part("layers.0.o", 0, 4, 0, 512, gain=-64),
        Part("layers.0.o", 0, 4, 0, 512, bias=896),
        Part("layers.0.o", 0, 4, 0, 512, bias=3),
        Part("layers.0.o", 0, -4, 0, 512),
        Part("layers.0.o", 0, 513, 0, 512),
        Part("layers.0.o", 0, 4, -64, 512),
        Part("layers.0.o", 0, 4, 0, 3),
        Part("layers.0.o", 0, 4, 0, 576),
        Part("layers.0.o", 0, 4, 1 << 60, 512),
        Part("layers.0.o", 0, 8, 0, 0),
    ],
)
def test_part_outside_of_memory_or_model_is_refused(part: Part) -> None:
    opened = descriptors()
    with pytest.raises(AdapterError, match=r"not inside its memory|not of this model"):
        make([PART, part]).open(CATALOGUE, torch.float32)
    assert descriptors() == opened


@pytest.mark.parametrize("size", [0, -64, 832, 960, 1 << 62])
def test_sizes_that_do_not_fit_the_memory_are_refused(size: int) -> None:
    opened = descriptors()
    with pytest.raises(AdapterError, match="memory"):
        make([PART], size=size).open(CATALOGUE, torch.float32)
    assert descriptors() == opened


def test_invalid_manifest_and_unsealed_memory_are_refused() -> None:
    descriptor = shm_adapter.allocate(768)
    os.pwrite(descriptor, b"nonsense", 768)
    with pytest.raises(AdapterError, match="can change its size"):
        ShmAdapter(os.dup(descriptor), 768, 8).open(CATALOGUE, torch.float32)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, shm_adapter.FIXED_SIZE)
    with pytest.raises(AdapterError, match="cannot be read"):
        ShmAdapter(descriptor, 768, 8).open(CATALOGUE, torch.float32)


def test_adapter_above_free_memory_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_adapter(tmp_path, plain_tensors(SITES, TARGETS), target_modules=TARGETS)
    monkeypatch.setattr("model_runner.lora.loading.adapter_reader.host_memory", lambda: (1000, 1000))
    with pytest.raises(AdapterError, match="of host memory, and 0 MiB are free"):
        read_adapter(root, announce=lambda _: pytest.fail("announced"))


def test_refused_adapter_leaves_no_descriptor(tmp_path: Path) -> None:
    tensors = plain_tensors(SITES, TARGETS)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    root = write_adapter(tmp_path, tensors, target_modules=TARGETS)
    opened = descriptors()
    for _ in range(3):
        with pytest.raises(AdapterError, match="NaN"):
            read_adapter(root)
    assert descriptors() == opened
