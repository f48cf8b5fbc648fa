"""Logit bias and the end ids that `min_tokens` forbids: a few entries of a few rows, written by one scatter each."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from model_runner.compute.sampler.parameters import Ints, ParameterTable
from model_runner.platform.device import upload


def biases(table: ParameterTable, rows: Ints, vocab: int) -> tuple[Ints, NDArray[np.float32]] | None:
    """[2, E] (index into `rows`, token below `vocab`) and [E] what to add; None when no row has a bias."""
    lines = [(index, *table.biases[row]) for index, row in enumerate(rows.tolist()) if row in table.biases]
    if not lines:
        return None
    where = np.concatenate([np.stack([np.full_like(tokens, index), tokens]) for index, tokens, _ in lines], axis=1)
    values = np.concatenate([values for _, _, values in lines])
    inside = where[1] < vocab
    return where[:, inside], values[inside]


def forbidden(table: ParameterTable, rows: Ints, positions: Ints, vocab: int) -> Ints | None:
    """[2, E] (index into `rows`, token below `vocab`): end ids of the rows that are still below their min_tokens; None
    when none.
    """
    early = np.nonzero(positions < table.first_free[rows])[0].tolist()
    lines = [(index, table.end_ids[row]) for index in early if (row := int(rows[index])) in table.end_ids]
    if not lines:
        return None
    where = np.concatenate([np.stack([np.full_like(tokens, index), tokens]) for index, tokens in lines], axis=1)
    return where[:, where[1] < vocab]


def add(logits_SV: torch.Tensor, entries: tuple[Ints, NDArray[np.float32]]) -> None:
    """Adds biases in place."""
    where, values = (upload(part, logits_SV.device) for part in entries)
    logits_SV.index_put_((where[0], where[1]), values, accumulate=True)


def forbid(logits_SV: torch.Tensor, entries: Ints) -> None:
    """Sets the entries to -inf in place."""
    where = upload(entries, logits_SV.device)
    logits_SV.index_put_((where[0], where[1]), logits_SV.new_full((), float("-inf")))
