"""The parts of the CPU benchmark that decide what its figures mean: floors, ratios, the file that is added to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench.shapes import SHAPES
from bench_cpu import address, parser
from cpu.book import OURS, Book, Entry, Idle, table
from cpu.linears import best, fused
from cpu.loads import LOADS, RANKS, TITLES, floor
from cpu.picture import draw

SHAPE = SHAPES["0.5b"]
ENTRY = Entry(1, 0, "0.5b", OURS, "base", 8, 100.0, 1.0, 50.0, 10.0)


def test_the_floor_is_that_of_the_bytes_of_who_is_active_together() -> None:
    base, unit = SHAPE.weight_bytes(), SHAPE.lora_bytes(1)
    for load, concurrency, units in (("base", 8, 0), ("one", 8, 16), ("mixed", 8, 200), ("sixteen", 32, 128)):
        asks = LOADS[load].asks(concurrency, seed=0)
        assert floor(SHAPE, asks, concurrency) == pytest.approx(base / (base + units * unit)), load
    alone = LOADS["mixed"].asks(1, seed=0)  # one at a time, of ranks 8, 16, 64
    assert floor(SHAPE, alone, 1) == pytest.approx(base / (base + (8 + 16 + 64) / 3 * unit))
    eight_of_many = LOADS["many"].asks(8, seed=0)
    assert floor(SHAPE, eight_of_many, 8) == floor(SHAPE, LOADS["sixteen"].asks(8, seed=0), 8)


def test_eight_mixed_adapters_add_28_percent_and_eight_of_rank_16_add_18() -> None:
    base = SHAPE.weight_bytes()
    for load, added in (("mixed", 0.28), ("sixteen", 0.18)):
        assert sum(SHAPE.lora_bytes(RANKS[name]) for name in LOADS[load].adapters) / base == pytest.approx(
            added, abs=0.005
        )


def test_prompts_of_one_seed_are_the_same_and_of_another_are_not() -> None:
    assert LOADS["mixed"].asks(8, 5) == LOADS["mixed"].asks(8, 5)
    prompts = {tuple(ask.prompt) for seed in range(4) for ask in LOADS["base"].asks(8, seed)}
    assert len(prompts) == 64


def test_the_matmuls_of_a_layer_are_those_of_its_linears() -> None:
    for shape in SHAPES.values():
        assert sum(i * o for i, o in fused(shape)) == sum(i * o for i, o in shape.linears().values())


def test_the_linears_own_time_is_that_of_the_faster_way() -> None:
    assert best([[3.0, 2.0], [1.0, 9.0], [4.0, 1.5]]) == 2.0


def test_ratios_are_taken_within_a_round_before_their_median() -> None:
    bases = [replace(ENTRY, round=n, tokens_per_s=rate) for n, rate in enumerate((100.0, 200.0, 400.0))]
    loaded = [replace(ENTRY, round=n, load="one", tokens_per_s=rate) for n, rate in enumerate((90.0, 100.0, 320.0))]
    stranger = replace(ENTRY, session=2, load="one", tokens_per_s=1.0)
    book = Book([*bases, *loaded, stranger], [])
    assert book.ratio(loaded, OURS, "base") == pytest.approx(0.8)
    assert book.ratio([stranger], OURS, "base") is None
    assert book.rate("0.5b", OURS, "base", 8) == 200.0
    assert book.rate("1b", OURS, "base", 8) is None


def test_a_book_that_is_added_to_keeps_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "new" / "book.json"
    book = Book.read(path)
    assert (book.entries, book.idle) == ([], [])
    book.entries.append(ENTRY)
    book.write(path)
    again = Book.read(path)
    again.idle.append(Idle(1, "0.5b", OURS, 90.0, 80.0))
    again.entries.append(replace(ENTRY, server="peer", ttft_ms=None, itl_ms=None))
    again.write(path)
    assert Book.read(path) == again
    assert again.servers() == [OURS, "peer"]


def test_the_table_tells_what_is_over_the_floor_and_what_was_not_measured_together() -> None:
    loaded = replace(ENTRY, load="one", tokens_per_s=50.0, floor=0.75)
    beside = replace(ENTRY, server="beside", tokens_per_s=25.0)
    apart = replace(ENTRY, server="apart", session=9, tokens_per_s=40.0, ttft_ms=None, itl_ms=None)
    text = table(Book([ENTRY, loaded, beside, apart], [Idle(1, "0.5b", OURS, 90.0, 80.0)]), TITLES)
    rows = {section.splitlines()[0]: section.splitlines()[2:] for section in text.strip().split("\n\n")}
    ours = next(lines for head, lines in rows.items() if OURS in head)
    assert ours[1].split()[-6:] == ["0.50", "0.75", "1.50", "-", "50", "10.0"]
    assert "0.25" in rows["0.5b, beside"][0].split()
    assert rows["0.5b, apart"][0].split()[-3:] == ["~0.40", "-", "-"]
    assert "1.12 of the linears' own 80.0 ms" in text


def test_a_peer_has_a_label_or_is_called_by_its_address() -> None:
    assert address("http://127.0.0.1:8000=vLLM off") == ("http://127.0.0.1:8000", "vLLM off")
    assert address("http://127.0.0.1:8000") == ("http://127.0.0.1:8000", "127.0.0.1:8000")
    args = parser().parse_args(["--peer", "http://a=x", "--peer", "http://b", "--parts", "base"])
    assert [label for _, label in args.peer] == ["x", "b"]


def test_a_picture_is_drawn_of_what_is_there_and_nothing_of_what_is_not(tmp_path: Path) -> None:
    book = Book([ENTRY, replace(ENTRY, load="one"), replace(ENTRY, server="peer", concurrency=1)], [])
    assert draw(tmp_path / "cpu.png", book, TITLES, "0.5b") is None
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert draw(tmp_path / "none.png", book, TITLES, "1b") == "--plot: nothing was measured of 1b"
    assert not (tmp_path / "none.png").exists()
