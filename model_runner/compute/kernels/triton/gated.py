"""The gate of an MLP: activation(gate) * up in one pass over [gate | up]. Legend: T tokens, I inner size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model_runner.compute.kernels.triton.activations import sigmoid
from model_runner.compute.kernels.triton.attention_shapes import power_of_2
from model_runner.compute.kernels.triton.interpreter import interpreting

_BLOCK = 1024


@triton.jit(do_not_specialize=["tokens"])
def gated_kernel(
    gate_up_ptr, out_ptr, tokens, token_stride,
    I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, GELU: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """A program computes BLOCK_I elements of BLOCK_T tokens. The activation is rounded before the product with up."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (offs_t < tokens)[:, None] & (offs_i < I)[None, :]
    offsets = offs_t.to(tl.int64)[:, None] * token_stride + offs_i[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offsets + I, mask=mask, other=0.0).to(tl.float32)
    sigmoid_of = gate
    if GELU:  # the tanh form of gelu, since (1 + tanh(x)) / 2 is the sigmoid of 2 x
        sigmoid_of = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    active = gate * sigmoid(sigmoid_of)
    out = active.to(dtype).to(tl.float32) * up
    tl.store(out_ptr + offs_t.to(tl.int64)[:, None] * I + offs_i[None, :], out.to(dtype), mask=mask)


def gated(gate_up_TJ: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    """Returns [T, I], silu(gate) * up or gelu(gate) * up in the tanh form, from [T, 2 I] of any token stride."""
    tokens, inner = gate_up_TJ.shape[0], gate_up_TJ.shape[1] // 2
    assert gate_up_TJ.stride(1) == 1
    out = gate_up_TJ.new_empty(tokens, inner)
    block_t, block_i = (256, power_of_2(inner)) if interpreting() else (1, min(_BLOCK, power_of_2(inner)))
    gated_kernel[triton.cdiv(tokens, block_t), triton.cdiv(inner, block_i)](
        gate_up_TJ, out, tokens, gate_up_TJ.stride(0), I=inner, BLOCK_T=block_t, BLOCK_I=block_i, GELU=gelu, num_warps=4
    )
    return out
