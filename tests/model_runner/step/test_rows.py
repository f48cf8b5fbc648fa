"""Rows: page tables grow and are reset, and a chunk that contradicts its row's state raises InternalError."""

from __future__ import annotations

import pytest
import torch

from engine.errors import InternalError
from engine.messages import Chunk, NewRow, Sampling
from model_runner.step.rows import RowTable


def table() -> RowTable:
    return RowTable(rows=3, max_pages=4, page_size=8, device=torch.device("cpu"))


def new(row: int, generation: int) -> NewRow:
    return NewRow(row=row, generation=generation, prompt_length=5, sampling=Sampling())


def chunk(row: int, generation: int, start: int, length: int, pages: list[int], lane: int = 0) -> Chunk:
    return Chunk(row=row, generation=generation, start=start, length=length, pages=pages, lane=lane)


def test_pages_are_appended_until_a_new_generation() -> None:
    rows = table()
    rows.begin(new(1, 1))
    rows.add_chunk(chunk(1, 1, 0, 10, [9, 4], lane=2))
    rows.add_chunk(chunk(1, 1, 10, 1, []))
    rows.add_chunk(chunk(1, 1, 16, 1, [7]))
    assert rows.tables[1].tolist() == [9, 4, 7, 0]
    assert rows.tables[[0, 2]].sum() == 0
    rows.begin(new(1, 2))
    rows.add_chunk(chunk(1, 2, 0, 3, [5]))
    assert rows.tables[1].tolist() == [5, 0, 0, 0]
    assert rows.lanes[1] == 0


@pytest.mark.parametrize(
    "bad",
    [
        chunk(1, 2, 0, 1, [1]),  # a generation that was not begun
        chunk(0, 1, 0, 1, [1]),  # a row that was never begun
        chunk(5, 1, 0, 1, [1]),  # no such row
        chunk(1, 1, 0, 9, [1]),  # more positions than pages
        chunk(1, 1, 0, 1, [1, 2, 3, 4, 5]),  # more pages than a row can have
        chunk(1, 1, 0, 0, [1]),  # no tokens
    ],
)
def test_contradicting_chunk_is_refused_without_changes(bad: Chunk) -> None:
    rows = table()
    rows.begin(new(1, 1))
    with pytest.raises(InternalError):
        rows.add_chunk(bad)
    assert rows.tables.sum() == 0
    assert rows.page_counts.sum() == 0


def test_generations_only_rise_until_a_reset() -> None:
    rows = table()
    rows.begin(new(0, 4))
    for generation in (4, 3):
        with pytest.raises(InternalError):
            rows.begin(new(0, generation))
    rows.reset()
    rows.begin(new(0, 1))
