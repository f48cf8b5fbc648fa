"""The LoRA delta of a step's adapted tokens at one site, to be compiled from delta.cpp: straight from the pool.

Legend: T tokens, n of them that are adapted, L lanes, q uses of pages by lanes, P pages of the pool, S slices, R = 16
units of a page, I in features, O out features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from model_runner.compiled.program import Draw, Function, Program
from model_runner.device import DTYPES

UNITS = 16

SHAPES = ((64, (160, 192)), (96, (40,)), (41, (130, 260, 287)))
"""In features, and where each slice ends: the last is of no round number."""


class Delta(nn.Module):
    """Adds scale * (x A^T) B of each lane's pages to its tokens' rows of y, in place: rounded between A and B, and once
    when it is added.
    """

    def forward(
        self,
        y_TO: torch.Tensor,
        x_TI: torch.Tensor,
        a_PSRI: torch.Tensor,
        b_PRO: torch.Tensor,
        units_PS: torch.Tensor,
        site: torch.Tensor,
        plan: torch.Tensor,
        scales_q: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        lanes = int(plan[0])
        tokens_L, uses_L = (plan[1 + which : 1 + 2 * lanes : 2].tolist() for which in (0, 1))
        rows_n, pages_q = torch.split(plan[1 + 2 * lanes :], [sum(tokens_L), sum(uses_L)])
        stops = site[3:].tolist()
        lots = torch.split(rows_n, tokens_L), torch.split(pages_q, uses_L), torch.split(scales_q, uses_L)
        for rows, pages, scales in zip(*lots, strict=True):
            h_qSmR = torch.einsum("mi,qsri->qsmr", x_TI[rows].float(), a_PSRI[pages].float())
            h_qSmR = (h_qSmR * scales[:, None, None, None]).to(x_TI.dtype).float()
            for index, (start, stop) in enumerate(zip((0, *stops), stops, strict=False)):
                delta = torch.einsum("qmr,qro->mo", h_qSmR[:, index], b_PRO[pages, :, start:stop].float())
                y_TO[rows, start:stop] = (y_TO[rows, start:stop].float() + delta).to(y_TO.dtype)
        return ()


def delta(function: Function) -> Program:
    """[y [T, O], x [T, I], a [P, S, 16, I], b [P, 16, O], units [P, S] int32: how many a page has, the others being
    zero; site [I, O, S, where each slice ends], plan [L, each lane's tokens and uses, rows [n], pages [q]] int64;
    scales [q] float32] -> [], y changed. Rows are distinct.
    """
    dtype = DTYPES[function.dtype]

    def arguments(size: int) -> tuple[torch.Tensor, ...]:
        draw, (inputs, stops), pages = Draw(dtype), SHAPES[size % len(SHAPES)], size + 4
        units_PS = torch.arange(pages * len(stops), dtype=torch.int32).view(pages, -1) * 7 % (UNITS + 1)
        there_PSR = torch.arange(UNITS) < units_PS[..., None]
        a_PSRI = draw(pages, len(stops), UNITS, inputs) * there_PSR[..., None]
        widths = torch.tensor([stop - start for start, stop in zip((0, *stops), stops, strict=False)])
        b_PRO = draw(pages, UNITS, stops[-1]) * there_PSR.transpose(1, 2).repeat_interleave(widths, dim=2)
        tokens_L = [size, 1, 1 + size // 2]
        uses_L = [1, 3, 2]
        rows_n = torch.arange(sum(tokens_L)).flip(0) + 1
        counts = [count for pair in zip(tokens_L, uses_L, strict=True) for count in pair]
        plan = torch.cat([torch.tensor([len(tokens_L), *counts]), rows_n, torch.arange(sum(uses_L)) * 3 % pages])
        site = torch.tensor([inputs, stops[-1], len(stops), *stops])
        tokens = draw(len(rows_n) + 2, stops[-1]), draw(len(rows_n) + 2, inputs)
        return *tokens, a_PSRI * 0.2, b_PRO * 0.2, units_PS, site, plan, 1.0 + torch.arange(sum(uses_L)) % 2

    defines = ("BFLOAT16",) if dtype is torch.bfloat16 else ()
    return Program(
        Delta(), arguments, source=Path(__file__).with_name("delta.cpp"), defines=defines, sizes=(1, 2, 7, 33)
    )
