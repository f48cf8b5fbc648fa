"""Stores the K and V of a step's tokens at their slots of the paged caches.

Legend: T tokens, K key/value heads, D head size, P pages, S page size, E = K * D elements of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model_runner.compute.kernels.triton.attention_shapes import power_of_2
from model_runner.compute.kernels.triton.interpreter import interpreting


@triton.jit
def store_row_block(from_ptr, to_ptr, from_T, to_T, real_T, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Copies the E elements of each token for which `real_T` is true."""
    offs_e = tl.arange(0, BLOCK_E)
    mask = real_T[:, None] & (offs_e < E)[None, :]
    values = tl.load(from_ptr + from_T[:, None] + offs_e[None, :], mask=mask)
    tl.store(to_ptr + to_T[:, None] + offs_e[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def store_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, tokens, k_stride, v_stride, page_stride, slot_stride,
    E: tl.constexpr, BLOCK_E: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A program stores BLOCK_T tokens. The E elements of a token are contiguous in the source and in the cache."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real_T = offs_t < tokens
    slots = tl.load(slots_ptr + offs_t, mask=real_T, other=0)
    to_T = (slots // PAGE).to(tl.int64) * page_stride + (slots % PAGE) * slot_stride
    store_row_block(k_ptr, k_cache_ptr, offs_t.to(tl.int64) * k_stride, to_T, real_T, E, BLOCK_E)
    store_row_block(v_ptr, v_cache_ptr, offs_t.to(tl.int64) * v_stride, to_T, real_T, E, BLOCK_E)


def store_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_cache_PSKD: torch.Tensor,
    v_cache_PSKD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Stores k and v at the tokens' slots of the caches. k and v may be slices of a wider tensor.

    Slots are int32: page number * page size + offset in the page.
    If several tokens have the same slot (padding of a captured step, in the scratch page), any one of them is stored.
    """
    tokens, kv_heads, head_dim = k_TKD.shape
    elements = kv_heads * head_dim
    assert k_TKD.stride()[1:] == v_TKD.stride()[1:] == k_cache_PSKD.stride()[2:] == (head_dim, 1)
    assert k_cache_PSKD.stride() == v_cache_PSKD.stride()
    block = 256 if interpreting() else 1
    store_kv_kernel[triton.cdiv(tokens, block),](
        k_TKD, v_TKD, k_cache_PSKD, v_cache_PSKD, slots_T, tokens,
        k_TKD.stride(0), v_TKD.stride(0), k_cache_PSKD.stride(0), k_cache_PSKD.stride(1),
        E=elements, BLOCK_E=power_of_2(elements), PAGE=k_cache_PSKD.shape[1], BLOCK_T=block,
        num_warps=4,
    )  # fmt: skip
