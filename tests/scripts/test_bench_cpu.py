"""The calculations of the CPU benchmark: floors, ratios, and the results file that runs append to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench.shapes import SHAPES
from bench_cpu import address, parser
from cpu.linears import best, fused
from cpu.loads import LOADS, RANKS, TITLES, floor
from cpu.plot import draw
from cpu.results import OURS, Entry, Idle, Results, table

SHAPE = SHAPES["0.5b"]
ENTRY = Entry(1, 0, "0.5b", OURS, "base", 8, 100.0, 1.0, 50.0, 10.0)


def test_floor_counts_bytes_of_concurrent_adapters() -> None:
    base, unit = SHAPE.weight_bytes(), SHAPE.lora_bytes(1)
    for load, concurrency, units in (("base", 8, 0), ("one", 8, 16), ("mixed", 8, 200), ("sixteen", 32, 128)):
        requests = LOADS[load].requests(concurrency, seed=0)
        assert floor(SHAPE, requests, concurrency) == pytest.approx(base / (base + units * unit)), load
    alone = LOADS["mixed"].requests(1, seed=0)  # three requests one at a time; their adapters have ranks 8, 16, 64
    assert floor(SHAPE, alone, 1) == pytest.approx(base / (base + (8 + 16 + 64) / 3 * unit))
    eight_of_many = LOADS["many"].requests(8, seed=0)
    assert floor(SHAPE, eight_of_many, 8) == floor(SHAPE, LOADS["sixteen"].requests(8, seed=0), 8)


def test_eight_mixed_adapters_add_28_percent_of_bytes() -> None:
    base = SHAPE.weight_bytes()
    for load, added in (("mixed", 0.28), ("sixteen", 0.18)):
        assert sum(SHAPE.lora_bytes(RANKS[name]) for name in LOADS[load].adapters) / base == pytest.approx(
            added, abs=0.005
        )


def test_prompts_depend_on_the_seed_only() -> None:
    assert LOADS["mixed"].requests(8, 5) == LOADS["mixed"].requests(8, 5)
    prompts = {tuple(request.prompt) for seed in range(4) for request in LOADS["base"].requests(8, seed)}
    assert len(prompts) == 64


def test_matmuls_of_a_layer_cover_its_linears() -> None:
    for shape in SHAPES.values():
        assert sum(i * o for i, o in fused(shape)) == sum(i * o for i, o in shape.linears().values())


def test_linears_time_is_that_of_the_faster_kind() -> None:
    assert best([[3.0, 2.0], [1.0, 9.0], [4.0, 1.5]]) == 2.0


def test_ratios_are_taken_within_rounds() -> None:
    bases = [replace(ENTRY, round=n, tokens_per_s=rate) for n, rate in enumerate((100.0, 200.0, 400.0))]
    loaded = [replace(ENTRY, round=n, load="one", tokens_per_s=rate) for n, rate in enumerate((90.0, 100.0, 320.0))]
    unpaired = replace(ENTRY, session=2, load="one", tokens_per_s=1.0)
    results = Results([*bases, *loaded, unpaired], [])
    assert results.ratio(loaded, OURS, "base") == pytest.approx(0.8)
    assert results.ratio([unpaired], OURS, "base") is None
    assert results.rate("0.5b", OURS, "base", 8) == 200.0
    assert results.rate("1b", OURS, "base", 8) is None


def test_appended_results_keep_former_entries(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    results = Results.read(path)
    assert (results.entries, results.idle) == ([], [])
    results.entries.append(ENTRY)
    results.write(path)
    again = Results.read(path)
    again.idle.append(Idle(1, "0.5b", OURS, 90.0, 80.0))
    again.entries.append(replace(ENTRY, server="peer", ttft_ms=None, itl_ms=None))
    again.write(path)
    assert Results.read(path) == again
    assert again.servers() == [OURS, "peer"]


def test_table_has_time_over_floor_and_marks_other_rounds() -> None:
    loaded = replace(ENTRY, load="one", tokens_per_s=50.0, floor=0.75)
    beside = replace(ENTRY, server="beside", tokens_per_s=25.0)
    apart = replace(ENTRY, server="apart", session=9, tokens_per_s=40.0, ttft_ms=None, itl_ms=None)
    text = table(Results([ENTRY, loaded, beside, apart], [Idle(1, "0.5b", OURS, 90.0, 80.0)]), TITLES)
    rows = {section.splitlines()[0]: section.splitlines()[2:] for section in text.strip().split("\n\n")}
    ours = next(lines for head, lines in rows.items() if OURS in head)
    assert ours[1].split()[-6:] == ["0.50", "0.75", "1.50", "-", "50", "10.0"]
    assert "0.25" in rows["0.5b, beside"][0].split()
    assert rows["0.5b, apart"][0].split()[-3:] == ["~0.40", "-", "-"]
    assert "1.12 of the linears' own 80.0 ms" in text


def test_peer_is_named_by_label_or_address() -> None:
    assert address("http://127.0.0.1:8000=vLLM off") == ("http://127.0.0.1:8000", "vLLM off")
    assert address("http://127.0.0.1:8000") == ("http://127.0.0.1:8000", "127.0.0.1:8000")
    args = parser().parse_args(["--peer", "http://a=x", "--peer", "http://b", "--parts", "base"])
    assert [label for _, label in args.peer] == ["x", "b"]


def test_plot_is_drawn_only_with_results(tmp_path: Path) -> None:
    results = Results([ENTRY, replace(ENTRY, load="one"), replace(ENTRY, server="peer", concurrency=1)], [])
    assert draw(tmp_path / "cpu.png", results, TITLES, "0.5b") is None
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert draw(tmp_path / "none.png", results, TITLES, "1b") == "--plot: nothing was measured of 1b"
    assert not (tmp_path / "none.png").exists()
