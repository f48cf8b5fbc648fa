"""A weight in the order in which oneDNN reads it, on a CPU: the same values, so that no call rearranges them.

torch's linear gives oneDNN a plain weight, which oneDNN rearranges at every call. The packed weight is the only copy.
Measured once on a Zen 5 with AVX512_BF16, 24 layers of hidden 896 and intermediate 4864, bfloat16: packed took 0.96 /
0.62 / 0.55 / 0.79 / 0.86 of the time at 1 / 8 / 32 / 128 / 512 rows. In float32, packed alike for 32 rows, it took 5.2
of the time at one row and 0.23 to 0.50 at the others. Decodes in float32 are often of one row, so float32 stays plain.

Legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

import torch

from model_runner.quantization.base import ALL
from model_runner.quantization.plain import Plain

ROWS = 32
"""The number of rows a weight is packed for: the order does well with fewer and with more."""


class Packed(Plain):
    """A weight [O, I] that `finish_loading` packs; the plain one is then given up."""

    @classmethod
    def supports(cls, dtype: torch.dtype, device: torch.device) -> bool:
        """bfloat16 on a CPU with such instructions. `torch.backends.mkldnn.set_flags(False)` switches it off."""
        if device.type != "cpu" or dtype is not torch.bfloat16 or not torch._C._has_mkldnn:
            return False
        return bool(torch._C._get_mkldnn_enabled() and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def finish_loading(self) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS)

    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        y_TO: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TI, self.weight, self.bias, "none", [], "")
        return y_TO

    def dequantize(self, rows: slice = ALL) -> torch.Tensor:
        return self.weight.to_dense()[rows]
