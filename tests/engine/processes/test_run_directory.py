"""The run directory goes with its launch; that of a killed launch is swept by the next one, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.processes import run_directory as module
from engine.processes.run_directory import LOCK, run_directory

HOLDER = """
import sys, time
from pathlib import Path
from engine.processes.run_directory import run_directory
with run_directory([Path(sys.argv[1])]) as directory:
    (directory / "clients.0").write_text("")
    print(directory, flush=True)
    time.sleep(600)
"""


HERE = Path()  # the test's directory, whose own path may be too long


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that holds a run directory beneath tmp_path, and that directory."""
    command = [sys.executable, "-c", HOLDER, "."]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    directory = Path(process.stdout.readline().strip())
    yield process, directory
    process.kill()
    process.communicate()


def test_directory_is_private_and_removed(tmp_path: Path) -> None:
    with run_directory([HERE]) as directory:
        assert directory.absolute().parent == tmp_path
        assert directory.stat().st_mode & 0o777 == 0o700
        assert [path.name for path in directory.iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []


def test_killed_launch_is_swept_and_a_running_one_is_not(
    holder: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, directory = holder
    with run_directory([HERE]):
        assert (directory / "clients.0").exists(), "its launch runs"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with run_directory([HERE]) as own:
        assert list(tmp_path.iterdir()) == [own.absolute()]


def _make(directory: Path, mode: int = 0o700) -> Path:
    directory.mkdir()
    (directory / LOCK).touch()
    directory.chmod(mode)
    return directory


def test_what_is_not_a_launch_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = _make(tmp_path / "precious")
    left = [
        _make(tmp_path / "other-1"),
        _make(tmp_path / "chorus-shared", 0o755),
        tmp_path / "chorus-no-lock",
        tmp_path / "chorus-file",
        tmp_path / "chorus-link",
        tmp_path / "chorus-pipe",
        tmp_path / "chorus-linked-lock",
    ]
    left[2].mkdir(0o700)
    left[3].touch()
    left[4].symlink_to(precious)
    left[5].mkdir(0o700)
    os.mkfifo(left[5] / LOCK)
    left[6].mkdir(0o700)
    (left[6] / LOCK).symlink_to(precious / LOCK)
    stale = _make(tmp_path / "chorus-stale")
    with monkeypatch.context() as other_user:
        other_user.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with run_directory([HERE]):
            assert stale.exists(), "it is of another user"
    with run_directory([HERE]):
        assert all(path.exists() or path.is_symlink() for path in [precious, *left])
        assert not stale.exists()


def test_directory_is_locked_before_it_can_be_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another launch sweeps at each moment while a directory is made."""
    calls = []

    def sweep_before(name: str) -> None:
        real = getattr(module.fcntl if name == "flock" else Path, name)

        def swept(*arguments: object) -> object:
            if not calls or calls[-1] != "sweeping":
                calls.append("sweeping")
                module._sweep(tmp_path)
                calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(module.fcntl if name == "flock" else Path, name, swept)

    sweep_before("flock")
    sweep_before("rename")
    with run_directory([HERE]) as directory:
        module._sweep(tmp_path)
        assert directory.exists()
    assert {"flock", "rename"} <= set(calls)


def test_no_writable_parent_is_one_line_with_reasons(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    parents = [Path("missing"), Path("file"), Path("x" * 64), Path("/proc")]
    with pytest.raises(ConfigError) as error, run_directory(parents):
        raise AssertionError("there is no place for it")
    for part in ("missing (No such file", "file (Not a directory)", "more than 63 bytes", "/proc (", "TMPDIR"):
        assert part in error.value.message
    assert "\n" not in error.value.message


def test_next_parent_is_taken_if_one_is_not_writable(tmp_path: Path) -> None:
    with run_directory([Path("missing"), HERE]) as directory:
        assert directory.absolute().parent == tmp_path


def test_tmpdir_is_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "temporary")
    assert module._default_parents() == [tmp_path / "temporary", Path("/tmp"), Path("/var/tmp")]
    monkeypatch.delenv("TMPDIR")
    assert module._default_parents() == [Path("/tmp"), Path("/var/tmp")]
