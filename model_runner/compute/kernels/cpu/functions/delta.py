"""The LoRA delta of a step's adapted tokens at one site, with weights read from the pool: spec and reference of
delta.cpp.

Legend: T tokens, n of them adapted, L lanes, q uses of pages by lanes, P pages of the pool, S slices, R = 16 units of a
page, I in features, O out features.
"""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.spec import Argument, KernelSpec, RandomTensors, source

UNITS = 16

SHAPES = ((64, (160, 192)), (96, (40,)), (41, (130, 260, 287)))
"""The sizes (in features, end of each slice) that the kernel is checked with; the last are not multiples of the vector
width.
"""


def delta(dtype: torch.dtype) -> KernelSpec:
    """Returns the spec of a kernel that adds scale * (x A^T) B of each lane's pages to the rows of y that belong to the
    lane's tokens. x A^T is rounded to the dtype, and so is the sum in y, once. The kernel's arguments are
    (y [T, O], x [T, I], a [P, S, 16, I], b [P, 16, O], units [P, S], site, plan, scales [q]).

    units       int32: the number of units that a page has in a slice; the other units are zero
    site        int64: I, O, S, where each slice ends
    plan        int64: L, each lane's number of tokens and of uses, the tokens' rows [n], all different, the pages [q]
    scales      float32
    """

    def arguments(size: int) -> tuple[Argument, ...]:
        random, (inputs, stops), pages = RandomTensors(dtype), SHAPES[size % len(SHAPES)], size + 4
        units_PS = torch.arange(pages * len(stops), dtype=torch.int32).view(pages, -1) * 7 % (UNITS + 1)
        real_PSR = torch.arange(UNITS) < units_PS[..., None]
        a_PSRI = random(pages, len(stops), UNITS, inputs) * real_PSR[..., None]
        widths = torch.tensor([stop - start for start, stop in zip((0, *stops), stops, strict=False)])
        b_PRO = random(pages, UNITS, stops[-1]) * real_PSR.transpose(1, 2).repeat_interleave(widths, dim=2)
        tokens_L, uses_L = [size, 1, 1 + size // 2], [1, 3, 2]
        rows_n = torch.arange(sum(tokens_L)).flip(0) + 1
        counts = [count for pair in zip(tokens_L, uses_L, strict=True) for count in pair]
        plan = torch.cat([torch.tensor([len(tokens_L), *counts]), rows_n, torch.arange(sum(uses_L)) * 3 % pages])
        site = torch.tensor([inputs, stops[-1], len(stops), *stops])
        tokens = random(len(rows_n) + 2, stops[-1]), random(len(rows_n) + 2, inputs)
        return *tokens, a_PSRI * 0.2, b_PRO * 0.2, units_PS, site, plan, 1.0 + torch.arange(sum(uses_L)) % 2

    return KernelSpec(source("delta.cpp"), _delta, arguments, sizes=(1, 2, 7, 33))


def _delta(
    y_TO: torch.Tensor,
    x_TI: torch.Tensor,
    a_PSRI: torch.Tensor,
    b_PRO: torch.Tensor,
    units_PS: torch.Tensor,
    site: torch.Tensor,
    plan: torch.Tensor,
    scales_q: torch.Tensor,
) -> None:
    lanes = int(plan[0])
    tokens_L, uses_L = (plan[1 + which : 1 + 2 * lanes : 2].tolist() for which in (0, 1))
    rows_n, pages_q = torch.split(plan[1 + 2 * lanes :], [sum(tokens_L), sum(uses_L)])
    stops = site[3:].tolist()
    by_lane = torch.split(rows_n, tokens_L), torch.split(pages_q, uses_L), torch.split(scales_q, uses_L)
    for rows, pages, scales in zip(*by_lane, strict=True):
        h_qSmR = torch.einsum("mi,qsri->qsmr", x_TI[rows].float(), a_PSRI[pages].float())
        h_qSmR = (h_qSmR * scales[:, None, None, None]).to(x_TI.dtype).float()
        for index, (start, stop) in enumerate(zip((0, *stops), stops, strict=False)):
            added = torch.einsum("qmr,qro->mo", h_qSmR[:, index], b_PRO[pages, :, start:stop].float())
            y_TO[rows, start:stop] = (y_TO[rows, start:stop].float() + added).to(y_TO.dtype)
