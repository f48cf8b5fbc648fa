"""Random draws that depend only on (seed, position): a counter-based hash, then an inverse CDF in token-id order.

No state is kept between draws, so a request's tokens depend neither on its batch nor on earlier steps, and a repeated
request draws the same tokens. Legend: S rows that sample, V vocabulary, B blocks of a row, b tokens of a block.
"""

from __future__ import annotations

import torch

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
BLOCK = 64


def as_int64(value: int) -> int:
    """Returns the 64 low bits of `value` in two's complement, as an int64 tensor stores them."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts copy the sign bit


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * as_int64(MIX_1)
    x = (x ^ _shift_right(x, 27)) * as_int64(MIX_2)
    return x ^ _shift_right(x, 31)


def uniforms(seeds_S: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """Returns [S] float64 in [0, 1): splitmix64 of (seed, position), from int64 tensors.

        u = (mix(mix(seed + G) + (position + 1) * G) >> 11) / 2**53        all modulo 2**64, G the golden gamma

    `mix` is the finaliser of splitmix64 (Steele, Lea and Flood 2014). The hash uses only integers, so results are equal
    on all devices.
    """
    state_S = _mix(_mix(seeds_S + as_int64(GOLDEN)) + (positions_S + 1) * as_int64(GOLDEN))
    return _shift_right(state_S, 11).to(torch.float64) * 2.0**-53


def inverse_cdf(logits_SV: torch.Tensor, u_S: torch.Tensor) -> torch.Tensor:
    """Returns [S] int64: the first token, in id order, at which the cumulated probability exceeds u. A token whose
    logit is -inf is never drawn.

    Sums are float64: over a large vocabulary the rounding of float32 sums would change draws. There are two levels, so
    that only one block of a row is cumulated token by token:

        block sums   | b0 | b1 | b2 | b3 |      the first block whose cumulated sum exceeds u * total
                               t0 t1 .. t63     the first token of this block whose cumulated sum exceeds the remainder
    """
    S, V = logits_SV.shape
    weights_SV = torch.exp(logits_SV - logits_SV.amax(-1, keepdim=True))
    if V % BLOCK:
        weights_SV = torch.nn.functional.pad(weights_SV, (0, -V % BLOCK))
    weights_SBb = weights_SV.view(S, -1, BLOCK)
    sums_SB = weights_SBb.sum(-1, dtype=torch.float64)
    block_S1, remainder_S1 = _first_above(sums_SB, u_S[:, None] * sums_SB.sum(-1, keepdim=True))
    weights_Sb = weights_SBb.gather(1, block_S1[:, :, None].expand(S, 1, BLOCK))[:, 0].double()
    token_S1, _ = _first_above(weights_Sb, remainder_S1)
    return (block_S1 * BLOCK + token_S1)[:, 0].clamp(max=V - 1)  # a row with NaN must not index out of range


def _first_above(weights_Sn: torch.Tensor, target_S1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two [S, 1]: the first index whose cumulated weight exceeds the target, and the target less the weights
    before this index.
    """
    edges_Sn = weights_Sn.cumsum(-1)
    total_S1 = edges_Sn[:, -1:]
    target_S1 = torch.minimum(target_S1, torch.nextafter(total_S1, torch.zeros_like(total_S1)))
    index_S1 = torch.searchsorted(edges_Sn, target_S1, right=True).clamp(max=weights_Sn.shape[1] - 1)
    before_S1 = torch.nn.functional.pad(edges_Sn, (1, 0)).gather(1, index_S1)
    return index_S1, target_S1 - before_S1
