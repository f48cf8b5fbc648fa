"""RMSNorm (1910.07467), optionally of the sum of x and a residual, in one pass that computes in float32.

The weight is one vector for all rows, or a table with a vector for each lane; `lanes` then has the lane of each token.

Legend: R rows to norm, N of each of the T tokens (N = 1 for a whole hidden state, or the number of heads), H elements
of a row, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model_runner.compute.kernels.triton.attention_shapes import power_of_2
from model_runner.compute.kernels.triton.interpreter import interpreting

KINDS = {"plain": 0, "wide": 1, "gemma": 2}
"""The kinds of norm. With n = x / rms, they are in order weight * cast(n), cast(weight * n), cast((1 + weight) * n)."""


@triton.jit
def weighted(normed, weight, dtype: tl.constexpr, KIND: tl.constexpr):
    """Returns normed rows times their weight, both float32, rounded where this kind of norm rounds."""
    if KIND == 0:
        return (normed.to(dtype).to(tl.float32) * weight).to(dtype)
    if KIND == 2:
        return (normed * (1.0 + weight)).to(dtype)
    return (normed * weight).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, lanes_ptr, out_ptr, total_ptr,
    rows, eps, token_stride, row_stride, weight_stride,
    N: tl.constexpr, H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    ADD: tl.constexpr, KIND: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program norms BLOCK_R rows. Residual, out and total are contiguous."""
    row, offs_h = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_H)
    mask = (row < rows)[:, None] & (offs_h < H)[None, :]
    from_R = (row // N).to(tl.int64) * token_stride + (row % N) * row_stride
    flat = row.to(tl.int64)[:, None] * H + offs_h[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + from_R[:, None] + offs_h[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + flat, mask=mask, other=0.0).to(tl.float32)
        total = x.to(dtype)
        tl.store(total_ptr + flat, total, mask=mask)
        x = total.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
    if LANES:
        lane = tl.load(lanes_ptr + row // N, mask=row < rows, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + lane[:, None] * weight_stride + offs_h[None, :], mask=mask, other=0.0)
    else:
        weight = tl.load(weight_ptr + offs_h, mask=offs_h < H, other=0.0)[None, :]
    tl.store(out_ptr + flat, weighted(normed, weight.to(tl.float32), dtype, KIND), mask=mask)


def norm(
    x: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    kind: str = "plain",
    residual: torch.Tensor | None = None,
    lanes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (the norm of x + residual, x + residual), contiguous; without a residual the second is x itself.

    x is [T, H] or [T, N, H] and may be a slice of a wider tensor; a residual is contiguous and of x's shape. The weight
    is [H], or with lanes [T] a table [L, H] of any row stride.
    """
    assert x.stride(-1) == weight_H.stride(-1) == 1
    assert weight_H.dim() == 1 + (lanes is not None)
    assert residual is None or (residual.is_contiguous() and residual.shape == x.shape)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(out)
    size = x.shape[-1]
    rows, rows_per_token = x.numel() // size, 1 if x.dim() == 2 else x.shape[1]
    block = power_of_2(size)
    rows_per_program = 256 if interpreting() else max(1, 2048 // block)
    norm_kernel[triton.cdiv(rows, rows_per_program),](
        x, x if residual is None else residual, weight_H, x if lanes is None else lanes, out, total, rows, eps,
        x.stride(0), x.stride(-2), weight_H.stride(0), N=rows_per_token, H=size,
        BLOCK_R=rows_per_program, BLOCK_H=block, ADD=residual is not None, KIND=KINDS[kind], LANES=lanes is not None,
        num_warps=min(16, max(4, rows_per_program * block // 1024)),
    )  # fmt: skip
    return out, total
