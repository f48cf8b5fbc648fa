"""Merges what was trained of the embedding or the head, in forms other than a full matrix, into a full matrix.

    LoRA or DoRA on another vocabulary    base_layer + B^T A, output columns scaled    no rank pages fit its tokens
    trained tokens                        the base's with some rows replaced

The matrix is written in place, some rows at a time, because it may take a gigabyte. Does not depend on files and
memory. Legend: V tokens of the vocabulary, H hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from model_runner.lora.base_weights import BaseWeights
from model_runner.lora.peft.tensor_mapping import TensorMapping
from model_runner.lora.variants.base import Blocks
from model_runner.lora.variants.saved_modules import BASE_WEIGHT
from model_runner.lora.variants.trained_tokens import TOKENS, TOKENS_BASE

BLOCK_ROWS = 4096


def merge(mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], into_VH: torch.Tensor) -> None:
    """Writes the saved base weight plus the delta, scaled by the variants, into `into_VH`."""
    assert mapping.format is not None
    small = {part: tensor.float() for part, tensor in tensors.items() if part != BASE_WEIGHT}
    change = mapping.format.change(mapping.module, small)
    a_RI, b_RO = change.a, change.b
    assert a_RI is not None
    assert b_RO is not None
    left_RV, right_RH = (a_RI, b_RO) if mapping.module.embeds else (b_RO, a_RI)

    def merged() -> Iterator[tuple[slice, torch.Tensor]]:
        for rows in _row_blocks(len(into_VH)):
            yield rows, tensors[BASE_WEIGHT][rows].float() + left_RV[:, rows].t() @ right_RH

    blocks: Blocks = merged
    for variant in mapping.variants:
        blocks = variant.scale_merged(blocks, small, embeds=mapping.module.embeds)
    for rows, block in blocks():
        into_VH[rows] = block


def replace_tokens(
    mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], into_VH: torch.Tensor, base: BaseWeights
) -> None:
    """Writes the rows of the base (of the saved base if there is one) and those of the trained tokens."""
    known_VH = tensors.get(TOKENS_BASE)
    if known_VH is None:
        weight_OI = base.weight(mapping.refs[0])
        known_VH = weight_OI.t() if mapping.module.embeds else weight_OI
    for rows in _row_blocks(len(into_VH)):
        into_VH[rows] = known_VH[rows]
    into_VH[list(mapping.tokens)] = tensors[TOKENS].to(into_VH.dtype)


def _row_blocks(count: int) -> Iterator[slice]:
    for begin in range(0, count, BLOCK_ROWS):
        yield slice(begin, begin + BLOCK_ROWS)
