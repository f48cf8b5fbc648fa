"""Converts a step's chunks to arrays: the layout and the forward's inputs. An invalid chunk raises InternalError.

Uses numpy only, no tensors. Legend: C chunks, T tokens of the step.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.errors import InternalError
from engine.messages import Chunk
from model_runner.step.layout import Layout


def layout_of(chunks: Sequence[Chunk], tables: NDArray[np.int32], page_size: int) -> Layout:
    """Returns the layout of `chunks`; `tables` are the page tables of all rows."""
    columns = np.array([(c.row, c.start, c.length, c.lane) for c in chunks], np.int32).T
    rows_C, starts_C, lengths_C, lanes_C = columns.copy()
    return Layout(rows_C, starts_C, lengths_C, lanes_C, tables, page_size)


def inputs_of(chunks: Sequence[Chunk], layout: Layout) -> NDArray[np.int64]:
    """Returns [4, T]: each token's row, its id as given in the chunk or -1 (the row's last sampled token), its
    position, and its lane.
    """
    given_T: list[int] = []
    for chunk in chunks:
        _check_tokens(chunk)
        given_T += chunk.tokens[: chunk.length] or [-1]
    rows_T, lanes_T = np.repeat(layout.rows_C, layout.lengths_C), np.repeat(layout.lanes_C, layout.lengths_C)
    columns = (rows_T, np.array(given_T, np.int64), layout.positions(), lanes_T)
    return np.stack(columns, dtype=np.int64, casting="unsafe")


def check_numbers(chunk: Chunk, lanes: Container[int], kv_pages: int) -> None:
    """Raises InternalError if the chunk's start, a page or a token is out of range, or its lane is not in `lanes`.

    A negative number would index an array from its end. Pages 1 to `kv_pages` belong to rows; page 0 is scratch.
    """
    if chunk.start < 0 or (chunk.pages and not 0 <= min(chunk.pages) <= max(chunk.pages) <= kv_pages):
        raise InternalError(f"row {chunk.row}: start {chunk.start}, pages {chunk.pages[:8]} of {kv_pages}")
    if chunk.lane and chunk.lane not in lanes:
        raise InternalError(f"row {chunk.row}: lane {chunk.lane} was never set")
    if chunk.tokens and min(chunk.tokens) < 0:
        raise InternalError(f"row {chunk.row}: token {min(chunk.tokens)}")


def _check_tokens(chunk: Chunk) -> None:
    expected = chunk.length + (chunk.scores and not chunk.samples)
    is_decode = not chunk.tokens and chunk.length == 1 and not chunk.scores
    if not is_decode and len(chunk.tokens) != expected:
        raise InternalError(f"row {chunk.row}: {len(chunk.tokens)} tokens came, {expected} were expected")
