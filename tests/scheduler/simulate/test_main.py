"""scheduler.simulate.__main__: the command line prints tables, writes files, and reports each error in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest
from fixtures.scheduling.small_world import PROFILE

from scheduler.simulate import profile
from scheduler.simulate.__main__ import PROFILES, main
from scheduler.simulate.trace import write
from scheduler.simulate.workload import Workload


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    write(tmp_path / "t.jsonl", Workload(adapters=12, requests=80, rate=40.0, output=(2, 9), prompt=(4, 30)).generate())
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(PROFILE))
    return [str(tmp_path / "t.jsonl"), "--profile", str(tmp_path / "p.json")]


def test_table_shows_configurations_side_by_side(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    flags = ["--max-loras", "2,4", "--lora-pool-size", "4,8", "--load", "0.5", "--json", str(out)]
    assert main([*files, *flags]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split("  ")[-1].strip() == "chorus 4/8"
    assert table[1].startswith("capacity")
    rows = json.loads(out.read_text())
    assert [row["label"] for row in rows] == ["chorus 2/4", "chorus 2/8", "chorus 4/4", "chorus 4/8"]
    assert all(row["summary"]["requests"] == 80 for row in rows)
    assert rows[0]["summary"]["adapter_fills"] > rows[3]["summary"]["adapter_fills"]


def test_plot_is_written(files: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main([*files, "--rule", "chorus,skip", "--plot", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_an_error(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*files, "--plot", str(tmp_path / "out.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--max-loras", "0"], "--max-loras"),
        (["--rule", "best"], "chorus, skip, drain"),
        (["--load", "-1"], "--load"),
        (["--max-num-seqs", "0"], "at least 1"),
        (["--colour", "red"], "colour"),
        (["--profile", "nowhere.json"], "nowhere.json"),
    ],
)
def test_error_is_one_line(
    files: list[str], flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*files, *flags]) == 2
    found = capsys.readouterr()
    assert problem in found.err
    assert len(found.err.splitlines()) == 1
    assert not found.out


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.json")), ids=lambda path: path.stem)
def test_bundled_profiles_can_be_read(path: Path) -> None:
    found = profile.read(path)
    pages = found.capacity(max_loras=8, pool_adapters=16).rank_pages
    assert all(count == 16 * -(-found.room.max_lora_rank // 16) for count in pages.values())


def test_profile_with_too_large_ranks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str]
) -> None:
    bad = msgspec.to_builtins(PROFILE) | {"lora_ranks": [64]}
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    assert main([files[0], "--profile", str(tmp_path / "bad.json")]) == 2
    assert "lora_ranks" in capsys.readouterr().err
