"""DoRA (2402.09353): every output column of W + B^T A has a trained length.

    gain = magnitude / |W + B^T A|      y = gain * (x W^T) + (x A^T) (gain * B) + b

The lengths are computed without forming this matrix, from one block of W at a time:

    |W|^2 + 2 * sum over r of B * (A W^T) + sum over r of B * (A A^T B)

Where W is served in bfloat16, A is split into two bfloat16 terms (16 bits of it), so that the product uses the
processor's bfloat16 instructions: for a 1B model and rank 64 that was measured as 1.5 s of one core instead of 2.1 s.
Legend: I in features, O out features, r rank, n rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch

from model_runner.lora.files.adapter_config import unsupported
from model_runner.lora.target_module import BaseSlices, Change, Module, Term
from model_runner.lora.variants.base import Blocks, Variant
from model_runner.lora.variants.biases import LoraBiases

MAGNITUDE = "lora_magnitude_vector"

BLOCK = 1 << 20
"""Elements of W that are widened to float32 at a time: they stay in the processor's cache."""


class Dora(Variant, frozen=True, kw_only=True):
    """The option `use_dora`: a trained magnitude vector in addition to A and B."""

    features: ClassVar = {"DoRA": "`use_dora`: A, B and a gain for every output column"}
    format_name: ClassVar = "DoRA"
    parts: ClassVar = frozenset({MAGNITUDE})
    spellings: ClassVar = {f"{MAGNITUDE}.weight": MAGNITUDE}
    becomes: ClassVar = frozenset[Term]({"gain"})
    revision_name: ClassVar = "dora"

    use_dora: bool = False

    @property
    def is_on(self) -> bool:
        """Whether the option is set."""
        return self.use_dora

    @property
    def required_parts(self) -> frozenset[str]:
        """The magnitude vector, which every targeted module must have."""
        return self.parts

    @property
    def whole_request_options(self) -> Sequence[str]:
        """`use_dora`: it acts on the whole request, so it is not served with an activated LoRA."""
        return ["use_dora"]

    def check_beside(self, others: Sequence[Variant]) -> None:
        """Raises AdapterError for `lora_bias`: PEFT has no DoRA whose B has a bias."""
        if any(isinstance(other, LoraBiases) and other.lora_bias for other in others):
            raise unsupported("lora_bias", True, "not together with use_dora")

    def apply(
        self, change: Change, module: Module, tensors: Mapping[str, torch.Tensor], base: BaseSlices, dtype: torch.dtype
    ) -> Change:
        """Sets the gain and multiplies B by it. A module without a magnitude is not targeted and is left unchanged."""
        if MAGNITUDE not in tensors:
            return change
        assert change.a is not None
        assert change.b is not None
        gain = tensors[MAGNITUDE] / _module_lengths(base, change.a, change.b, split=dtype is torch.bfloat16)
        return replace(change, b=change.b * gain, gain=gain)

    def scale_merged(self, blocks: Blocks, tensors: Mapping[str, torch.Tensor], *, embeds: bool) -> Blocks:
        """Scales the output columns: columns of the matrix [V, H] for the embedding, rows for the head."""
        if MAGNITUDE not in tensors:
            return blocks
        return partial(_scaled_columns if embeds else _scaled_rows, blocks, tensors[MAGNITUDE])


def _scaled_columns(blocks: Blocks, magnitude_H: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    squares_H = torch.stack([block.double().square().sum(0) for _, block in blocks()]).sum(0)
    gain_H = magnitude_H / squares_H.sqrt().float()
    for rows, block in blocks():
        yield rows, block.mul_(gain_H)


def _scaled_rows(blocks: Blocks, magnitude_V: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    for rows, block in blocks():
        yield rows, block.mul_((magnitude_V[rows] / block.norm(dim=1))[:, None])


def _module_lengths(base: BaseSlices, a_rI: torch.Tensor, b_rO: torch.Tensor, *, split: bool) -> torch.Tensor:
    """Returns the lengths [O] of the rows of W + B^T A, computed by slice on the device of the base's weight."""
    found, start = [], 0
    for part in base:
        weight, stop = part.weight(), start + part.out_features
        factors = a_rI.to(weight.device), b_rO[:, start:stop].to(weight.device)
        found.append(lengths(weight, part.row_squares(), *factors, split=split).cpu())
        start = stop
    return torch.cat(found)


def row_squares(weight_OI: torch.Tensor) -> torch.Tensor:
    """Returns |W|^2 of every row, [O] float32."""
    return torch.cat([wide_nI.square_().sum(1) for wide_nI in _widened(weight_OI)])


def lengths(
    weight_OI: torch.Tensor, squares_O: torch.Tensor, a_rI: torch.Tensor, b_rO: torch.Tensor, *, split: bool
) -> torch.Tensor:
    """Returns the length of every row of W + B^T A, [O] float32, given |W|^2. A and B are float32.

    `split`: a bfloat16 W is multiplied in bfloat16, by A in two terms.
    """
    if split and weight_OI.dtype is torch.bfloat16:
        halves_OQ = weight_OI @ _halves(a_rI).t()
        cross_Or = halves_OQ.float().view(len(weight_OI), 2, -1).sum(1)
    else:
        cross_Or = torch.cat([wide_nI @ a_rI.t() for wide_nI in _widened(weight_OI)])
    wide_rO = b_rO.double()
    own_O = (wide_rO * ((a_rI @ a_rI.t()).double() @ wide_rO)).sum(0)
    squares = squares_O.double() + 2 * (cross_Or.double() * wide_rO.t()).sum(1) + own_O
    return squares.clamp_(min=0).sqrt_().float()


def _widened(weight_OI: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields blocks of rows in float32; each is overwritten by the next."""
    rows = max(1, BLOCK // weight_OI.shape[1])
    wide = torch.empty(min(rows, len(weight_OI)), weight_OI.shape[1], device=weight_OI.device)
    for begin in range(0, len(weight_OI), rows):
        block_nI = weight_OI[begin : begin + rows]
        yield wide[: len(block_nI)].copy_(block_nI)


def _halves(a_rI: torch.Tensor) -> torch.Tensor:
    """Returns A as two bfloat16 terms, [2r, I]: A rounded, and the remainder of A."""
    rounded = a_rI.bfloat16()
    return torch.cat([rounded, (a_rI - rounded.float()).bfloat16()])
