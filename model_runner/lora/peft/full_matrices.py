"""Whole matrices of the embedding and the head: what was trained of them in other ways, made one with the rest.

    LoRA or DoRA on a vocabulary of its own     base_layer + B^T A, columns scaled       no rank pages fit its tokens
    trained tokens                              the base's, with some rows in their place

Written in place, some rows at a time, since a matrix may take a gigabyte. Knows nothing of files and memory. Legend:
V tokens of the vocabulary, H hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from model_runner.lora.peft.base_weights import BaseWeights
from model_runner.lora.peft.names import TOKENS, TOKENS_BASE
from model_runner.lora.peft.tensor_mapping import BASE_WEIGHT, MAGNITUDE, TensorMapping

ROWS = 4096


def merge(mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], into_VH: torch.Tensor) -> None:
    """The saved base with the delta on top; the scale of a DoRA is by column of what the module answers."""
    assert mapping.format is not None
    small = {part: tensor.float() for part, tensor in tensors.items() if tensor is not tensors[BASE_WEIGHT]}
    a_RI, b_RO = mapping.format.factors(mapping.module, small)
    left_RV, right_RH = (a_RI, b_RO) if mapping.module.embeds else (b_RO, a_RI)

    def merged() -> Iterator[tuple[slice, torch.Tensor]]:
        for rows in _slices(len(into_VH)):
            yield rows, tensors[BASE_WEIGHT][rows].float() + left_RV[:, rows].t() @ right_RH

    magnitude = small.get(MAGNITUDE)
    gain_H = None
    if magnitude is not None and mapping.module.embeds:
        squares_H = torch.stack([part.double().square().sum(0) for _, part in merged()]).sum(0)
        gain_H = magnitude / squares_H.sqrt().float()
    for rows, part in merged():
        if gain_H is not None:
            part *= gain_H
        elif magnitude is not None:
            part *= (magnitude[rows] / part.norm(dim=1))[:, None]
        into_VH[rows] = part


def replace_tokens(
    mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], into_VH: torch.Tensor, base: BaseWeights
) -> None:
    """The base's rows, its own where it saved all of them, and those of the trained tokens."""
    known = tensors.get(TOKENS_BASE)
    if known is None:
        weight_OI = base.weight(mapping.places[0])
        known = weight_OI.t() if mapping.module.embeds else weight_OI
    for rows in _slices(len(into_VH)):
        into_VH[rows] = known[rows]
    into_VH[list(mapping.tokens)] = tensors[TOKENS].to(into_VH.dtype)


def _slices(count: int) -> Iterator[slice]:
    for begin in range(0, count, ROWS):
        yield slice(begin, begin + ROWS)
