"""Applies the rotary embedding to heads; in the same pass optionally norms q and k, and stores k and v in the caches.

    qkv of a token   [ q 0 | q 1 | ... | k 0 | ... | v 0 | ... ]     a row is one head of one token
                       norm, rotate       norm,        unchanged
                       -> out             rotate       -> V cache
                                          -> K cache

Without caches all heads are rotated and written to out.

Legend: T tokens, N heads that are written to `out`, K key/value heads, D head size, E rotated elements of a head, the
first ones: element i < E/2 is rotated with i + E/2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model_runner.compute.kernels.triton.attention_shapes import power_of_2
from model_runner.compute.kernels.triton.interpreter import interpreting
from model_runner.compute.kernels.triton.norm import KINDS, weighted

_ROWS = 16

Norms = tuple[torch.Tensor, torch.Tensor, float, str, torch.Tensor | None]
"""The weight of q's norm, the weight of k's norm, their eps and kind, and the tokens' lanes or None."""


@triton.jit
def weights_of(q_weight_ptr, k_weight_ptr, lane, stride, offs, mask, is_q, LANES: tl.constexpr):
    """Returns [rows, elements]: the elements `offs` of each row's norm weight; with LANES, of its lane's weight."""
    if LANES:
        own = lane.to(tl.int64)[:, None] * stride + offs[None, :]
        q_own = tl.load(q_weight_ptr + own, mask=mask[None, :], other=0.0).to(tl.float32)
        k_own = tl.load(k_weight_ptr + own, mask=mask[None, :], other=0.0).to(tl.float32)
        return tl.where(is_q[:, None], q_own, k_own)
    q_weight = tl.load(q_weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_q[:, None], q_weight[None, :], k_weight[None, :])


@triton.jit
def store_heads(
    values, offs, live, to_q, to_cache, is_q, is_k, is_v, out_ptr, k_cache_ptr, v_cache_ptr, STORE: tl.constexpr
):  # fmt: skip
    """Stores the elements `offs` of every row in out, the K cache or the V cache, depending on the row's head."""
    tl.store(out_ptr + to_q[:, None] + offs[None, :], values, mask=live & is_q[:, None])
    if STORE:
        tl.store(k_cache_ptr + to_cache[:, None] + offs[None, :], values, mask=live & is_k[:, None])
        tl.store(v_cache_ptr + to_cache[:, None] + offs[None, :], values, mask=live & is_v[:, None])


@triton.jit(do_not_specialize=["tokens"])
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, lanes_ptr, slots_ptr, out_ptr, k_cache_ptr, v_cache_ptr,
    tokens, token_stride, page_stride, slot_stride, weight_stride, eps,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
    NORM: tl.constexpr, KIND: tl.constexpr, STORE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS rows, which are the heads of one or several tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // (N + 2 * K), row % (N + 2 * K)
    real = token < tokens
    is_q, is_v = real & (head < N), real & (head >= N + K)
    is_k = real & (head >= N) & (head < N + K)
    from_x = token.to(tl.int64) * token_stride + head * D
    to_q = (token.to(tl.int64) * N + head) * D
    to_cache = to_q
    if STORE:
        slot = tl.load(slots_ptr + token, mask=real, other=0)
        to_cache = (slot // PAGE).to(tl.int64) * page_stride + (slot % PAGE) * slot_stride + (head + K - N % K) % K * D

    offs_e, offs_s = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_S)
    in_e, in_s = offs_e < HALF, offs_s < D - 2 * HALF
    live_e, live_s = real[:, None] & in_e[None, :], real[:, None] & in_s[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.load(x_ptr + from_x[:, None] + offs_e[None, :], mask=live_e, other=0.0)
    second = tl.load(x_ptr + from_x[:, None] + HALF + offs_e[None, :], mask=live_e, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if D > 2 * HALF:
        unrotated = tl.load(x_ptr + from_x[:, None] + 2 * HALF + offs_s[None, :], mask=live_s, other=0.0)
        c = unrotated.to(tl.float32)
    if NORM:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if D > 2 * HALF:
            squares += tl.sum(c * c, 1)
        inverse_rms = tl.rsqrt(squares / D + eps)[:, None]
        lane = token
        if LANES:
            lane = tl.load(lanes_ptr + token, mask=real, other=0).to(tl.int32)
        weight_a = weights_of(q_weight_ptr, k_weight_ptr, lane, weight_stride, offs_e, in_e, is_q, LANES)
        weight_b = weights_of(q_weight_ptr + HALF, k_weight_ptr + HALF, lane, weight_stride, offs_e, in_e, is_q, LANES)
        a = weighted(a * inverse_rms, weight_a, dtype, KIND).to(tl.float32)
        b = weighted(b * inverse_rms, weight_b, dtype, KIND).to(tl.float32)
        if D > 2 * HALF:
            weight_c = weights_of(
                q_weight_ptr + 2 * HALF, k_weight_ptr + 2 * HALF, lane, weight_stride, offs_s, in_s, is_q, LANES
            )
            unrotated = tl.where(is_v[:, None], unrotated, weighted(c * inverse_rms, weight_c, dtype, KIND))

    angle = token.to(tl.int64)[:, None] * HALF + offs_e[None, :]
    cos = tl.load(cos_ptr + angle, mask=live_e, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=live_e, other=0.0).to(tl.float32)
    first = tl.where(is_v[:, None], first, (a * cos - b * sin).to(dtype))
    second = tl.where(is_v[:, None], second, (b * cos + a * sin).to(dtype))
    store_heads(first, offs_e, live_e, to_q, to_cache, is_q, is_k, is_v, out_ptr, k_cache_ptr, v_cache_ptr, STORE)
    store_heads(
        second, HALF + offs_e, live_e, to_q, to_cache, is_q, is_k, is_v, out_ptr, k_cache_ptr, v_cache_ptr, STORE
    )
    if D > 2 * HALF:
        store_heads(
            unrotated,
            2 * HALF + offs_s,
            live_s,
            to_q,
            to_cache,
            is_q,
            is_k,
            is_v,
            out_ptr,
            k_cache_ptr,
            v_cache_ptr,
            STORE,
        )


def rope(x_TND: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
    """Returns x [T, N, D] with all heads rotated.

    x may be a slice of a wider tensor; cos and sin [T, 1, E / 2] are contiguous.
    """
    out = torch.empty_like(x_TND, memory_format=torch.contiguous_format)
    _launch(x_TND, cos_T1E, sin_T1E, out, None, None, None, None)
    return out


def rope_and_store(
    qkv_TJD: torch.Tensor,
    cos_T1E: torch.Tensor,
    sin_T1E: torch.Tensor,
    k_cache_PSKD: torch.Tensor,
    v_cache_PSKD: torch.Tensor,
    slots_T: torch.Tensor,
    norms: Norms | None = None,
) -> torch.Tensor:
    """Returns q [T, N, D], normed and rotated; stores k, normed and rotated, and v at the slots (int32) of the caches.

    J = N + 2 K. `norms`: the weights [D] of q's and k's norms, their eps and kind (see norm.py); with the tokens'
    lanes the weights are tables [L, D] of any row stride.
    """
    assert k_cache_PSKD.stride() == v_cache_PSKD.stride()
    assert k_cache_PSKD.stride()[2:] == (k_cache_PSKD.shape[3], 1)
    tokens, heads, size = qkv_TJD.shape
    out = qkv_TJD.new_empty(tokens, heads - 2 * k_cache_PSKD.shape[2], size)
    _launch(qkv_TJD, cos_T1E, sin_T1E, out, k_cache_PSKD, v_cache_PSKD, slots_T, norms)
    return out


def _launch(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slots: torch.Tensor | None,
    norms: Norms | None,
) -> None:
    tokens, heads, size = x.shape
    half = cos.shape[-1]
    assert x.stride()[1:] == (size, 1)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    q_weight, k_weight, eps, kind, lanes = norms or (cos, cos, 0.0, "plain", None)
    assert q_weight.stride() == k_weight.stride()
    caches = (0, 1, 0, 0) if k_cache is None else (k_cache.shape[2], *k_cache.shape[1:2], *k_cache.stride()[:2])
    kv_heads, page_size, page_stride, slot_stride = caches
    rows = 1024 if interpreting() else _ROWS
    rope_kernel[triton.cdiv(tokens * heads, rows),](
        x, cos, sin, q_weight, k_weight, x if lanes is None else lanes, x if slots is None else slots, out,
        out if k_cache is None else k_cache, out if v_cache is None else v_cache,
        tokens, x.stride(0), page_stride, slot_stride, q_weight.stride(0), eps,
        N=heads - 2 * kv_heads, K=kv_heads, D=size, HALF=half, PAGE=page_size,
        ROWS=rows, BLOCK_E=power_of_2(half), BLOCK_S=power_of_2(max(1, size - 2 * half)),
        NORM=norms is not None, KIND=KINDS[kind], STORE=k_cache is not None, LANES=lanes is not None,
        num_warps=4,
    )  # fmt: skip
