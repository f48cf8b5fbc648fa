"""Attention over gathered keys and values in plain torch. Does not depend on pages.

Legend: C rows of one token each, n tokens of one row, L gathered positions, N query heads, K key/value heads,
G = N / K, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention


class Scores(NamedTuple):
    """How a layer turns q k^T into scores: multiplied by `scale`, then, if there is a softcap, made
    softcap * tanh(score / softcap).
    """

    scale: float
    softcap: float | None = None


def decode(
    q_CND: torch.Tensor, k_CKLD: torch.Tensor, v_CKLD: torch.Tensor, seen_CL: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """Returns the attention [C, N, D] of rows of one token each.

    The G query heads of a key/value head take the place of tokens, so that K and V are not repeated.
    """
    chunks, heads, _, size = k_CKLD.shape
    q_CKGD = q_CND.reshape(chunks, heads, -1, size)
    seen = seen_CL[:, None, None].expand(-1, 1, q_CKGD.shape[2], -1)
    if scores.softcap is not None:
        return _softcapped(q_CKGD, k_CKLD, v_CKLD, seen, scores).flatten(1, 2)
    mixed = scaled_dot_product_attention(q_CKGD, k_CKLD, v_CKLD, attn_mask=seen, scale=scores.scale)
    return mixed.flatten(1, 2)


def prefill(
    q_nND: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, seen_nL: torch.Tensor | None, scores: Scores
) -> torch.Tensor:
    """Returns the attention [n, N, D] of the tokens of one row.

    The dimension K is torch's batch and G its heads; keys and values are expanded to G without a copy. `seen_nL`: which
    positions each token sees; None: token i sees the first i + 1 positions, and L is n.
    """
    _, heads, size = k_LKD.shape
    q_KGnD = q_nND.reshape(len(q_nND), heads, -1, size).permute(1, 2, 0, 3)
    k, v = (x.transpose(0, 1)[:, None].expand(-1, q_KGnD.shape[1], -1, -1) for x in (k_LKD, v_LKD))
    if scores.softcap is not None:
        causal = torch.ones(len(q_nND), len(k_LKD), dtype=torch.bool, device=q_nND.device).tril()
        out = _softcapped(q_KGnD, k, v, causal if seen_nL is None else seen_nL, scores)
    else:
        causally = seen_nL is None
        out = scaled_dot_product_attention(q_KGnD, k, v, attn_mask=seen_nL, is_causal=causally, scale=scores.scale)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _softcapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Computes attention with a softcap, which scaled_dot_product_attention does not support."""
    scale, softcap = scores
    assert softcap is not None
    capped = softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * (scale / softcap))
    return capped.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v
