"""The parts of the GPU check that need no GPU: grid, cases, results of our columns, resuming, tables, stubs."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import kernels, report
from gpu.case import Case, Run, make_case
from gpu.check import listing, main
from gpu.columns.fetch import extract
from gpu.columns.registry import Column, columns
from gpu.columns.stubs import Stub, StubFinder
from gpu.grid import SITES, Point, SiteShape, floor_us, points
from gpu.results import Results, about, file_name
from gpu.runner import end_to_end
from gpu.runner.rows import Rows
from gpu.runner.shape8b import host_adapters, load

CPU = torch.device("cpu")
SMALL = (SiteShape("qkv", 48, (32, 16, 16)), SiteShape("gate_up", 32, (48, 48)))
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 2000,
    "max_position_embeddings": 512,
}


def test_grid_has_sixty_points_and_a_floor_for_each() -> None:
    assert len(points()) == len({point.key for point in points()}) == 60
    assert all(point.lanes <= point.tokens for point in points())
    mixed = Point(8, 8, "mixed")
    assert mixed.ranks == (8, 16, 32, 64) * 2
    assert Point(8, 3, "8").lane_of_token == [0, 1, 2, 0, 1, 2, 0, 1]
    assert Point(512, 2, "8").lane_of_token == [0] * 256 + [1] * 256
    # 32 layers of an 8B model with one adapter of rank 16: 84 MB
    assert 32 * sum(site.lora_bytes((16,)) for site in SITES) == pytest.approx(84e6, rel=0.01)
    assert floor_us(SITES[1], Point(1, 1, "16"), 4e6) == pytest.approx(16 * 8192 * 2 / 4e6)


@pytest.mark.parametrize("point", [Point(4, 4, "mixed"), Point(130, 2, "16")], ids=lambda p: p.key)
def test_our_columns_equal_the_reference(point: Point, tmp_path: Path) -> None:
    chosen = [column for column in columns(tmp_path) if not column.absent]
    assert [column.name for column in chosen] == ["csgmv", "triton"]
    found = kernels.measure(point, chosen, lambda work, calls: float(calls), CPU, torch.float32, 0, SMALL)
    copies = 2.0  # the fewest copies of the adapters, because there is no cache to exceed
    assert found["base"] == {"qkv": copies, "gate_up": copies}
    assert found["csgmv"] == found["triton"] == {"qkv": 0.0, "gate_up": 0.0}


def test_wrong_or_failing_peer_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(case: Case) -> Run:
        return case.base

    def fails(case: Case) -> Run:
        raise RuntimeError("no such kernel")

    chosen = [Column("wrong", wrong, True), Column("fails", fails, True)]
    found = kernels.measure(Point(2, 1, "8"), chosen, lambda work, calls: 1.0, CPU, torch.float32, 0, SMALL[:1])
    assert found["wrong"]["qkv"].startswith("wrong by")
    assert found["fails"]["qkv"] == "RuntimeError: no such kernel"
    ours = kernels.measure(Point(2, 1, "8"), [Column("ours", fails)], lambda *_: 1.0, CPU, torch.float32, 0, SMALL[:1])
    assert ours["ours"] == found["fails"]
    assert "no such kernel" in capsys.readouterr().err  # a traceback is printed, because our own columns must work


def test_copies_exceed_the_cache() -> None:
    one, many = (make_case(SMALL[0], Point(1, 1, "8"), CPU, torch.float32, size) for size in (0, 1 << 20))
    assert (len(one.copies), len(many.copies)) == (2, 12)
    assert not torch.equal(one.expected(0), one.expected(1))


def test_interrupted_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = about("Card 3000")
    path = tmp_path / "deep" / file_name(facts)
    assert path.name == f"gpu-{facts['date']}-card-3000.json"
    measured: list[str] = []

    def measure(point: Point, wanted: list[Column], *_: Any) -> dict[str, Any]:
        measured.append(point.key)
        return {column.name: {"o": 1.0} for column in wanted}

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "bytes_per_us", lambda: 1e6)
    monkeypatch.setattr(kernels, "l2_bytes", lambda: 0)
    ticks = iter(range(1000))
    monkeypatch.setattr(kernels.time, "monotonic", lambda: float(next(ticks)))
    ours, peer = Column("csgmv", lambda case: case.base), Column("peer", lambda case: case.base, True)
    kernels.run(Results(path, facts), [ours], 20.0)
    assert 0 < len(measured) < 60
    kernels.run(Results(path, facts), [ours], 1e9)
    assert measured == [point.key for point in points()]
    kernels.run(Results(path, facts), [ours, peer], 1e9)  # a new peer: measures all points again, for this peer only
    assert len(measured) == 120
    assert set(json.loads(path.read_text())["kernels"]["t1-l1-r8"]) == {"csgmv", "peer", "floor"}
    other = Results(path, {**facts, "torch": "other"})  # another torch version: former results are not kept
    assert other.section("kernels") == {}


def test_tables_sum_sites_and_name_absent_columns() -> None:
    chosen = [
        Column("csgmv", lambda case: case.base),
        Column("peer", lambda case: case.base, True),
        Column("gone", lambda case: case.base, True, "not there"),
    ]
    done = {
        "t1-l1-r8": {"csgmv": {"qkv": 1.0, "o": 2.0}, "peer": {"qkv": 4.0, "o": 5.0}, "floor": {"qkv": 0.5, "o": 0.5}},
        "t8-l1-r8": {"csgmv": {"qkv": 1.0}, "peer": {"qkv": "wrong by 1"}, "floor": {"qkv": 0.5}},
    }
    lines = report.kernel_table(done, chosen).splitlines()
    assert lines[2].split() == ["1", "1", "8", "3.0", "9.0", "1.0", "3.00"]
    assert lines[3].split() == ["8", "1", "8", "1.0", "-", "0.5", "-"]
    assert lines[4] == "left out: gone (not there)"
    assert report.troubles(done) == ["1 x peer: wrong by 1"]


def test_allowed_times_follow_the_goals() -> None:
    base = {"batch": 32, "lanes": 0, "ms": 4.0, "bytes": 4_000_000, "modules": 0}
    eight = {"batch": 32, "lanes": 8, "ms": 5.0, "bytes": 5_000_000, "modules": 128}
    assert report.allowed_ms(base, base, 1000.0) == pytest.approx(4.8)
    assert report.allowed_ms(eight, base, 1000.0) == pytest.approx(4.0 + 1.5 + 0.256)
    text = report.step_table({"decode": {"b32-l0": base, "b32-l8": eight}, "switching": {"of_base": 0.9}}, 1000.0)
    assert text.splitlines()[3].split() == ["32", "8", "5.000", "0.800", "6400", "5.756"]
    assert "0.900 of base" in text


def test_single_files_of_a_package_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "big.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "bigpkg/deep/kernel.py",
            "from bigpkg.env import flags\nfrom bigpkg.other import helper, Thing\n"
            "from bigpkg.deep.near import VALUE\n\n\ndef run():\n    return helper(2), bool(flags.FAST.get()), VALUE\n",
        )
        archive.writestr("bigpkg/deep/near.py", "VALUE = 7\n")
        archive.writestr("bigpkg/deep/__init__.py", "raise RuntimeError('the whole package')\n")
        archive.writestr("bigpkg/huge.py", "raise RuntimeError\n")
        archive.writestr("bigpkg/deep/library.so", "no")
    assert extract(wheel, ("bigpkg/deep/",), tmp_path) == 3
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    StubFinder("bigpkg", tmp_path, {"bigpkg.other": {"helper": lambda value: value + 1}}).install()
    from bigpkg.deep.kernel import Thing, run  # type: ignore[import-not-found]

    assert run() == (3, False, 7)
    assert isinstance(Thing, Stub)
    for name in [name for name in sys.modules if name.split(".")[0] == "bigpkg"]:
        del sys.modules[name]


def test_check_without_peers_and_without_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = listing(tmp_path).splitlines()
    assert sum("left out" in line and "--fetch-peers" in line for line in lines) == 4
    assert "column csgmv" in lines
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--results", str(tmp_path)]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_end_to_end_on_a_tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROMPT": 8, "STEPS": 3, "REPEATS": 2, "REQUEST_TOKENS": 4}.items():
        monkeypatch.setattr(end_to_end, name, value)
    runner = load(
        tmp_path,
        shape=TINY,
        device="cpu",
        dtype="float32",
        enable_lora=True,
        max_loras=end_to_end.ADAPTERS,
        max_lora_rank=end_to_end.RANK,
        lora_pool_adapters=end_to_end.ADAPTERS,
        max_running_requests=8,
        context_length=64,
    )
    footprint = host_adapters(runner, end_to_end.ADAPTERS, end_to_end.RANK)
    rows = end_to_end.decode_row(runner, footprint, 8, 8), end_to_end.decode_row(runner, footprint, 8, 0)
    mixed, base = rows
    pages = sum(runner.capacity.rank_page_bytes[group] * count for group, count in footprint.pages.items())
    assert mixed["bytes"] - base["bytes"] == 8 * pages
    assert (mixed["modules"], base["modules"]) == (8, 0)
    assert min(mixed["ms"], base["ms"]) > 0
    assert end_to_end.switching(runner, footprint, True, seconds=0.3) > 0
    through = [_tokens(runner, footprint, lanes) for lanes in ([0], [1], [2])]
    assert through[0] != through[1] == through[2]  # the adapters share their values and differ from the base
    runner.close()


def _tokens(runner: Any, footprint: Any, lanes: list[int]) -> list[int]:
    rows = Rows(runner, 1, 8, 8)
    rows.point(footprint, {1: 1, 2: 2})
    rows.prefill(lanes)
    return [runner.execute(rows.step(go_on=[0])).tokens[0] for _ in range(6)]
