"""Files are opened beneath an open directory: roots, links, names, special files, and paths that are swapped."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.processes.resources import descriptors

from engine.directory import Directory, FileMissing, FileRefused, real_path
from engine.errors import StorageFailed
from engine.lora_roots import allowed_roots

NAME = "adapter_config.json"
CONTENT = b"{}"
LIMIT = 1 << 20


def adapter(directory: Path, content: bytes = CONTENT) -> Path:
    directory.mkdir(parents=True)
    (directory / NAME).write_bytes(content)
    return directory


def content(directory: Path, *roots: Path, name: str = NAME) -> bytes:
    with Directory(directory, [str(root) for root in roots]) as opened:
        return opened.read(name, LIMIT)


def recorded_flags(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the flags of every `os.open` call from now on, and returns the list of them."""
    flags, plain_open = list[int](), os.open

    def recording(path: str, flag: int, **options: int | None) -> int:
        flags.append(flag)
        return plain_open(path, flag, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", recording)
    return flags


def linked(link: Path, target: Path | str) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def test_directory_outside_of_the_roots_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    inside, outside = adapter(root / "a"), adapter(tmp_path / "outside")
    adapter(tmp_path / "root-2")
    adapter(tmp_path / "root (deleted)" / "a")
    (root / "link").symlink_to(outside)
    assert content(inside, tmp_path / "other", root) == CONTENT
    assert content(inside, inside) == CONTENT
    assert content(outside) == CONTENT, "without roots every place is allowed"
    paths = "outside", "root-2", "root (deleted)/a", "root/link", "root/../outside", "root/a/../../outside", "."
    for path in paths:
        with pytest.raises(FileRefused, match="lies outside of --lora-root"):
            Directory(tmp_path / path, [str(root)])


def test_directory_with_parent_components_under_a_root_is_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    adapter(root / "a")
    adapter(root / "b", b"other")
    adapter(root / "deep" / "c", b"deep")
    (root / "link").symlink_to(root / "deep" / "c")
    assert content(root / "a" / ".." / "b", root) == b"other"
    (root / "deep" / NAME).write_bytes(b"parent of c")
    assert content(root / "link" / "..", root) == b"parent of c", "the parent is that of the directory, not of the link"


def test_root_that_is_a_link_is_its_target(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    adapter(real / "a")
    link.symlink_to(real)
    roots = allowed_roots([str(link)])
    assert roots[0] == str(real)
    for path in (link, real):
        with Directory(path / "a", roots) as opened:
            assert opened.read(NAME, LIMIT) == CONTENT
    linked(real / "a" / NAME, tmp_path / "secret")
    (tmp_path / "secret").write_bytes(b"secret")
    with Directory(link / "a", roots) as opened, pytest.raises(FileRefused, match="lies outside"):
        opened.read(NAME, LIMIT)


def test_root_that_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    adapter(root / "a")
    adapter(tmp_path / "outside" / "a", b"secret")
    root.rename(tmp_path / "former")
    root.symlink_to(tmp_path / "outside")
    with pytest.raises(FileRefused, match="lies outside"):
        content(root / "a", root)


def test_link_that_vanishes_while_it_is_followed_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert real_path(tmp_path / "link" / "none") == str(tmp_path / "none")

    def vanished(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", vanished)
    assert real_path(tmp_path / "link") == ""


def test_file_behind_a_link_counts_where_it_lies(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", adapter(tmp_path / "outside", b"secret")
    inside, other = adapter(root / "a"), adapter(root / "other", b"other")
    for target in (other / NAME, Path("..") / "other" / NAME):
        linked(inside / NAME, target)
        assert content(inside, root) == b"other"
    for target in (outside / NAME, Path("..") / ".." / "outside" / NAME):
        linked(inside / NAME, target)
        with pytest.raises(FileRefused, match=f"^{NAME}: lies outside of --lora-root"):
            content(inside, root)
        assert content(inside) == b"secret"
        assert content(inside, root, outside) == b"secret"


def test_hub_cache_links_into_its_blobs(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    repo = hub / "models--org--sql"
    snapshot = repo / "snapshots" / "c0ffee"
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repo / "blobs" / "hash").write_bytes(b"blob")
    (snapshot / NAME).symlink_to(Path("..") / ".." / "blobs" / "hash")
    assert content(snapshot, hub) == b"blob"
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "sql").symlink_to(snapshot)
    assert content(tmp_path / "root" / "sql", tmp_path / "root", hub) == b"blob"
    with pytest.raises(FileRefused, match="lies outside"):
        content(snapshot, snapshot)


def test_missing_file_outside_looks_like_one_that_exists(tmp_path: Path) -> None:
    root = tmp_path / "root"
    inside, outside = adapter(root / "a"), adapter(tmp_path / "outside")
    told = set()
    for target in (outside / NAME, outside / "none", tmp_path / "none" / NAME):
        linked(inside / NAME, target)
        with pytest.raises(FileRefused) as refusal:
            content(inside, root)
        told.add(refusal.value.message)
    assert len(told) == 1
    told = set()
    for path in (outside, tmp_path / "none"):
        with pytest.raises(FileRefused) as refusal:
            Directory(path, [str(root)])
        told.add(refusal.value.message.replace(str(path), "PATH"))
    assert len(told) == 1


def test_missing_files_and_directories_are_told_apart(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a")
    with pytest.raises(FileMissing, match=r"^none: not found"):
        content(directory, tmp_path, name="none")
    linked(directory / "dangling", directory / "none")
    with pytest.raises(FileMissing, match=r"^dangling: not found"):
        content(directory, tmp_path, name="dangling")
    for path in (tmp_path / "none", directory / NAME):
        with pytest.raises(FileMissing, match=f"^{path}: no such directory"):
            Directory(path)


@pytest.mark.parametrize("name", ["../a/adapter_config.json", "/etc/hostname", "a\0b", "a\ud800b", "x" * 300])
def test_strange_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileRefused):
        content(adapter(tmp_path / "a"), name=name)


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_name_of_a_directory_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileRefused):
        content(adapter(tmp_path / "a"), name=name)


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NO_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": socket_at,
    "directory": os.mkdir,
    "link to a descriptor": lambda path: path.symlink_to("/proc/self/fd/0"),
}


@pytest.mark.parametrize("roots", [True, False])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_regular_file_is_never_opened(
    kind: str, roots: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapter(tmp_path / "a"))  # a socket's path must be short
    (tmp_path / "a" / NAME).unlink()
    NO_FILES[kind](Path(NAME))
    flags = recorded_flags(monkeypatch)
    with pytest.raises(FileRefused, match=r"no regular file|lies outside"):
        content(tmp_path / "a", *([tmp_path] if roots else []))
    assert len(flags) == 2
    assert all(flag & os.O_PATH for flag in flags)


def test_file_outside_is_never_opened_for_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = adapter(tmp_path / "root" / "a"), adapter(tmp_path / "outside")
    linked(inside / NAME, outside / NAME)
    flags = recorded_flags(monkeypatch)
    with pytest.raises(FileRefused, match="lies outside"):
        content(inside, tmp_path / "root")
    assert len(flags) == 2
    assert all(flag & os.O_PATH for flag in flags)


def test_swapped_directory_does_not_change_an_open_one(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", adapter(tmp_path / "outside", b"secret")
    inside = adapter(root / "team" / "a")
    (inside / "more").write_bytes(b"more")
    with Directory(inside, [str(root)]) as opened:
        assert opened.read(NAME, LIMIT) == CONTENT
        (root / "team").rename(root / "former")
        (root / "team").mkdir()
        (root / "team" / "a").symlink_to(outside)
        assert opened.read(NAME, LIMIT) == CONTENT
        assert opened.names() == [NAME, "more"]
        assert opened.has("more")


def test_directory_that_moved_out_of_the_roots_is_refused(tmp_path: Path) -> None:
    inside = adapter(tmp_path / "root" / "a")
    with Directory(inside, [str(tmp_path / "root")]) as opened:
        inside.rename(tmp_path / "moved")
        with pytest.raises(FileRefused, match="lies outside"):
            opened.read(NAME, LIMIT)


def test_swapped_file_does_not_change_an_open_one(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a")
    with Directory(directory) as opened:
        file = opened.open(NAME)
        (tmp_path / "secret").write_bytes(b"secret")
        linked(directory / NAME, tmp_path / "secret")
        assert file.read() == CONTENT
    assert file.closed


def test_closed_directory_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter(tmp_path / "a"))
    opened = Directory(tmp_path / "a")
    opened.close()
    with pytest.raises(FileRefused, match="cannot be read"):
        opened.read(NAME, LIMIT)
    with pytest.raises(FileRefused, match="cannot be read"):
        opened.names()
    opened.close()


def test_file_above_the_limit_is_refused(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a", b"x" * (LIMIT + 1))
    with pytest.raises(FileRefused, match="more than 1 MiB"):
        content(directory)
    (directory / NAME).write_bytes(b"x" * LIMIT)
    assert len(content(directory)) == LIMIT


def test_disk_error_in_a_small_file_is_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first bytes of a small file are read when it is opened, as it may be a Git-LFS pointer."""

    def fails(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    directory = adapter(tmp_path / "a")
    before = descriptors()
    monkeypatch.setattr(os, "pread", fails)
    with Directory(directory) as opened, pytest.raises(StorageFailed, match=r"cannot read .*Input/output error"):
        opened.open(NAME)
    assert descriptors() == before


def test_refusals_and_reads_leave_no_descriptor(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", adapter(tmp_path / "outside")
    inside = adapter(root / "a")
    linked(inside / "out", outside / NAME)
    os.mkfifo(inside / "pipe")
    before = descriptors()
    for _ in range(3):
        with Directory(inside, [str(root)]) as opened:
            opened.open(NAME)
            opened.check(NAME)
            assert [opened.has(name) for name in (NAME, "out", "pipe", "none")] == [True, False, False, False]
            for name in ("out", "pipe", "none", "a/b"):
                with pytest.raises(FileRefused):
                    opened.open(name)
        with pytest.raises(FileRefused):
            Directory(outside, [str(root)])
    assert descriptors() == before
