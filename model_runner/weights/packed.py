"""Linear weights in the order in which oneDNN reads them, on a CPU: the same values, so that no call rearranges them.

torch's linear hands oneDNN a plain weight, which is rearranged again at every call. A packed weight is the only copy:
its shape is the plain one's, `dense` gives the plain values back, and nothing but `linear` multiplies by it. Knows
nothing of models.
Measured once on a Zen 5 with AVX512_BF16, 24 layers of hidden 896 and intermediate 4864, bfloat16: packed took 0.96 /
0.62 / 0.55 / 0.79 / 0.86 of the time at 1 / 8 / 32 / 128 / 512 rows. In float32, packed alike for 32 rows, it took 5.2
of the time at one row and 0.23 to 0.50 at the others, so float32, whose decodes are often alone, stays plain.

Legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

import torch
from torch.nn import functional

ROWS = 32
"""The number of rows a weight is packed for: the order does well with fewer and with more."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing is possible here and pays. `torch.backends.mkldnn.set_flags(False)` switches it off."""
    if device.type != "cpu" or dtype is not torch.bfloat16 or not torch._C._has_mkldnn:
        return False
    return bool(torch._C._get_mkldnn_enabled() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight_OI: torch.Tensor) -> torch.Tensor:
    """[O, I]: the same weight, packed."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, ROWS)
    return packed


def dense(weight_OI: torch.Tensor) -> torch.Tensor:
    """[O, I]: the plain weight; a copy of a packed one."""
    return weight_OI.to_dense() if weight_OI.is_mkldnn else weight_OI


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """[T, I] -> [T, O], by a plain or a packed weight."""
    if not weight_OI.is_mkldnn:
        return functional.linear(x_TI, weight_OI, bias_O)
    y_TO: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TI, weight_OI, bias_O, "none", [], "")
    return y_TO
