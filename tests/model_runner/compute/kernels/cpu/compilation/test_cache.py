"""The directory of compiled functions: whose it is, what a file's name depends on, what is swept away."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from model_runner.compute.kernels.cpu.compilation import cache
from model_runner.compute.kernels.cpu.compilation.cache import UNUSED_SECONDS, Cache, Unsafe, directory, seal
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.program import Function

NORM = Function("add_norm")


def test_it_lies_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, parent in (
        (str(tmp_path / "x"), tmp_path / "x"),
        ("", tmp_path / ".cache"),
        ("no", tmp_path / ".cache"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert directory() == parent / "chorus" / "compiled"


def test_it_is_made_for_this_user_alone(tmp_path: Path) -> None:
    root = tmp_path / "new" / "chorus" / "compiled"
    Cache(root)
    Cache(root)
    assert [path.stat().st_mode & 0o777 for path in (root, root.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o740, 0o777])
def test_it_is_refused_where_others_may_look_in(tmp_path: Path, mode: int) -> None:
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(mode)
    with pytest.raises(Unsafe, match=f"it is {mode:o} of user {os.geteuid()}"):
        Cache(tmp_path / "compiled")


def test_it_is_refused_where_it_is_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(tmp_path / "compiled")
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(Unsafe, match="must be this user's"):
        Cache(tmp_path / "compiled")


def test_neither_a_link_nor_a_file_will_do(tmp_path: Path) -> None:
    Cache(tmp_path / "compiled")
    (tmp_path / "link").symlink_to(tmp_path / "compiled")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(Unsafe, match=f"{name}: no directory"):
            Cache(tmp_path / name)
    with pytest.raises(Unsafe, match="cannot be kept"):
        Cache(tmp_path / "file" / "below")


def test_a_name_depends_on_all_that_goes_into_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Cache(tmp_path / "compiled")
    names = [kept.path(NORM), kept.path(Function("silu_mul")), kept.path(Function("add_norm", "float32"))]
    monkeypatch.setattr(cache, "processor", lambda: "another")
    names.append(kept.path(NORM))
    monkeypatch.setattr(cache.torch, "__version__", "9.9")
    names.append(kept.path(NORM))
    monkeypatch.setitem(registry.FUNCTIONS, "add_norm", registry.gates.silu_mul)  # written elsewhere
    names.append(kept.path(NORM))
    assert len(set(names)) == len(names)
    assert kept.path(NORM) == names[-1]
    assert names[0].name.startswith("add_norm-")


def test_a_file_is_sound_only_as_it_was_sealed(tmp_path: Path) -> None:
    kept = Cache(tmp_path / "compiled")
    path = kept.root / "f.so"
    assert not kept.sound(path)
    with kept.workshop() as workshop:
        (workshop / "l.so").write_bytes(b"library")
        seal(workshop / "l.so", path)
    assert kept.sound(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes() + b"more")
    assert not kept.sound(path)
    assert not path.exists()


def test_a_workshop_goes_and_so_do_those_of_the_dead(tmp_path: Path) -> None:
    kept = Cache(tmp_path / "compiled")
    for name in ("build-killed", "build-empty"):
        (kept.root / name).mkdir()
    (kept.root / "build-killed" / cache.BUSY).write_text("")
    with kept.workshop() as one:
        assert list(kept.root.glob("build-*")) == [one]
        with kept.workshop() as other:
            assert set(kept.root.glob("build-*")) == {one, other}  # whose builders live
        assert list(kept.root.glob("build-*")) == [one]
    assert not list(kept.root.glob("build-*"))


def test_what_was_not_used_for_long_is_removed(tmp_path: Path) -> None:
    kept = Cache(tmp_path / "compiled")
    used, unused, other = (kept.root / name for name in ("used.so", "unused.so", "notes"))
    for path in (used, unused, other):
        path.write_bytes(b"")
        os.utime(path, (0, time.time() - UNUSED_SECONDS - 100))
    os.utime(used)
    with kept.workshop():
        assert used.exists()
        assert not unused.exists()
        assert other.exists()
