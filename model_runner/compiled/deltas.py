"""LoRA deltas to be compiled: a few tokens, each with pages of its own, straight from the pool.

Each weight is read where it lies and once a token; no page is gathered, padded or packed. It wins where a lane has few
tokens: decodes. Legend: T tokens, n of them that are adapted, k pages of each, P pages of the pool, S slices, R = 16
units of a page, I in features, O out features.
"""

from __future__ import annotations

import torch
from torch import nn

from model_runner.compiled.program import Draw, Function, Program
from model_runner.device import DTYPES

UNITS = 16

LONGEST_SUM = 4096
"""Inductor sums longer ones in cascades, which takes several times as long: they are cut in parts."""


class Delta(nn.Module):
    """Adds scale * (x A^T) B of each adapted token's pages to its row of y, in place."""

    def __init__(self, inputs: int, stops: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        self.parts = next(
            parts for parts in range(1, inputs + 1) if inputs % parts == 0 and inputs // parts <= LONGEST_SUM
        )
        self.slices = list(zip((0, *stops), stops, strict=False))
        self.blocks = blocks

    def forward(
        self,
        y_TO: torch.Tensor,
        x_TI: torch.Tensor,
        a_PSRI: torch.Tensor,
        b_PRO: torch.Tensor,
        rows_n: torch.Tensor,
        pages_nk: torch.Tensor,
        scales_nk: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        h_nkSR = (self._shrink(x_TI[rows_n], a_PSRI, pages_nk) * scales_nk[:, :, None, None]).to(x_TI.dtype).float()
        deltas = [
            self._expand(h_nkSR[:, :, index, :, None], b_PRO[..., start:stop], pages_nk)
            for index, (start, stop) in enumerate(self.slices)
        ]
        delta_nO = torch.cat(deltas, 1) if len(deltas) > 1 else deltas[0]
        y_TO.index_put_((rows_n,), y_TO[rows_n] + delta_nO.to(y_TO.dtype))
        return ()

    def _shrink(self, x_nI: torch.Tensor, a_PSRI: torch.Tensor, pages_nk: torch.Tensor) -> torch.Tensor:
        if self.parts == 1:
            return (x_nI.float()[:, None, None, None] * a_PSRI[pages_nk].float()).sum(-1)
        shape = (self.parts, x_nI.shape[1] // self.parts)
        a_nkSRpi = torch.unflatten(a_PSRI, -1, shape)[pages_nk].float()
        return (torch.unflatten(x_nI.float(), -1, shape)[:, None, None, None] * a_nkSRpi).sum(-1).sum(-1)

    def _expand(self, h_nkR1: torch.Tensor, b_PRW: torch.Tensor, pages_nk: torch.Tensor) -> torch.Tensor:
        """[n, W]. Threads share the tokens; a lone one's columns, where there are blocks of them."""
        if self.blocks == 1 or b_PRW.shape[-1] % self.blocks:
            return (h_nkR1 * b_PRW[pages_nk].float()).sum((1, 2))
        b_BnkRw = torch.unflatten(b_PRW, -1, (self.blocks, -1))[pages_nk].float().movedim(3, 0)
        return (h_nkR1 * b_BnkRw).sum((2, 3)).movedim(0, 1).flatten(1)


def delta(function: Function) -> Program:
    """`sizes` (blocks of columns, in features, where each slice ends): [y [T, O], x [T, I], a [P, S, 16, I],
    b [P, 16, O], rows [n], pages [n, k], scales [n, k] float32] -> [], y changed. Rows are distinct.
    """
    blocks, inputs, *stops = function.sizes

    def arguments(size: int) -> tuple[torch.Tensor, ...]:
        draw, k = Draw(DTYPES[function.dtype]), 1 + size % 3
        pages_nk = (torch.arange(size * k) * 5 % (size + 4)).view(size, k)
        scales_nk = 1.0 + torch.arange(size * k).view(size, k) % 2
        weights = draw(size + 4, len(stops), UNITS, inputs), draw(size + 4, UNITS, stops[-1])
        tokens = draw(size + 1, stops[-1]), draw(size + 1, inputs)
        return *tokens, *(weight * 0.02 for weight in weights), torch.arange(size).flip(0) + 1, pages_nk, scales_nk

    tokens, pool, pairs = {0: "T"}, {0: "P"}, {0: "n", 1: "k"}
    return Program(Delta(inputs, tuple(stops), blocks), arguments, (tokens, tokens, pool, pool, {0: "n"}, pairs, pairs))
