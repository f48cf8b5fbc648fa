"""The cache of compiled kernels: access to its directory, what a file name depends on, what is removed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from model_runner.compute.kernels.cpu.compilation import cache
from model_runner.compute.kernels.cpu.compilation.cache import (
    UNUSED_SECONDS,
    KernelCache,
    UnsafeDirectory,
    default_directory,
    install,
)
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.spec import KernelKey

NORM = KernelKey("add_norm")


def test_default_directory_follows_the_xdg_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, parent in (
        (str(tmp_path / "x"), tmp_path / "x"),
        ("", tmp_path / ".cache"),
        ("no", tmp_path / ".cache"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert default_directory() == parent / "chorus" / "compiled"


def test_directory_is_created_for_this_user_alone(tmp_path: Path) -> None:
    root = tmp_path / "new" / "chorus" / "compiled"
    KernelCache(root)
    KernelCache(root)
    assert [path.stat().st_mode & 0o777 for path in (root, root.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o740, 0o777])
def test_directory_open_to_other_users_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(mode)
    with pytest.raises(UnsafeDirectory, match=f"it is {mode:o} of user {os.geteuid()}"):
        KernelCache(tmp_path / "compiled")


def test_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KernelCache(tmp_path / "compiled")
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(UnsafeDirectory, match="must belong to this user"):
        KernelCache(tmp_path / "compiled")


def test_symlinks_and_files_are_refused_as_the_directory(tmp_path: Path) -> None:
    KernelCache(tmp_path / "compiled")
    (tmp_path / "link").symlink_to(tmp_path / "compiled")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(UnsafeDirectory, match=f"{name}: not a directory"):
            KernelCache(tmp_path / name)
    with pytest.raises(UnsafeDirectory, match="cannot be cached"):
        KernelCache(tmp_path / "file" / "below")


def test_file_name_depends_on_all_that_the_code_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_cache = KernelCache(tmp_path / "compiled")
    names = [
        kernel_cache.path(NORM),
        kernel_cache.path(KernelKey("silu_mul")),
        kernel_cache.path(KernelKey("add_norm", "float32")),
    ]
    monkeypatch.setattr(cache, "processor", lambda: "another")
    names.append(kernel_cache.path(NORM))
    monkeypatch.setattr(cache.torch, "__version__", "9.9")
    names.append(kernel_cache.path(NORM))
    monkeypatch.setitem(registry.SPECS, "add_norm", registry.gate.silu_mul)  # its spec comes from another module
    names.append(kernel_cache.path(NORM))
    assert len(set(names)) == len(names)
    assert kernel_cache.path(NORM) == names[-1]
    assert names[0].name.startswith("add_norm-")


def test_file_is_intact_only_as_it_was_installed(tmp_path: Path) -> None:
    kernel_cache = KernelCache(tmp_path / "compiled")
    path = kernel_cache.root / "f.so"
    assert not kernel_cache.is_intact(path)
    with kernel_cache.build_directory() as directory:
        (directory / "l.so").write_bytes(b"library")
        install(directory / "l.so", path)
    assert kernel_cache.is_intact(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes() + b"more")
    assert not kernel_cache.is_intact(path)
    assert not path.exists()


def test_build_directories_of_ended_builders_are_removed(tmp_path: Path) -> None:
    kernel_cache = KernelCache(tmp_path / "compiled")
    for name in ("build-killed", "build-empty"):
        (kernel_cache.root / name).mkdir()
    (kernel_cache.root / "build-killed" / cache.LOCK_FILE).write_text("")
    with kernel_cache.build_directory() as one:
        assert list(kernel_cache.root.glob("build-*")) == [one]
        with kernel_cache.build_directory() as other:
            assert set(kernel_cache.root.glob("build-*")) == {one, other}  # both builders live
        assert list(kernel_cache.root.glob("build-*")) == [one]
    assert not list(kernel_cache.root.glob("build-*"))


def test_libraries_unused_for_long_are_removed(tmp_path: Path) -> None:
    kernel_cache = KernelCache(tmp_path / "compiled")
    used, unused, other = (kernel_cache.root / name for name in ("used.so", "unused.so", "notes"))
    for path in (used, unused, other):
        path.write_bytes(b"")
        os.utime(path, (0, time.time() - UNUSED_SECONDS - 100))
    os.utime(used)
    with kernel_cache.build_directory():
        assert used.exists()
        assert not unused.exists()
        assert other.exists()
