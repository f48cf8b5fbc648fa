"""A linear on a CPU whose weight is stored in the order in which oneDNN reads it, so that no call reorders it.

torch's linear gives oneDNN a plain weight, which oneDNN reorders at every call. The packed weight is the only copy.
Measured once on a Zen 5 with AVX512_BF16, 24 layers of hidden 896 and intermediate 4864, bfloat16: packed took 0.96 /
0.62 / 0.55 / 0.79 / 0.86 of plain's time at 1 / 8 / 32 / 128 / 512 rows. In float32, also packed for 32 rows, it took
5.2 times plain's time at one row and 0.23 to 0.50 of it at the other numbers of rows. Decodes in float32 often have
one row, so float32 stays plain.

Legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

import torch

from model_runner.quantization.base import ALL
from model_runner.quantization.plain import Plain

ROWS = 32
"""The number of rows of x that a weight is packed for. The resulting order is also fast for fewer and more rows."""


class Packed(Plain):
    """A linear with one weight [O, I], which `finish_loading` replaces by its packed form."""

    @classmethod
    def supports(cls, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether `dtype` is bfloat16 and `device` a CPU on which oneDNN supports bfloat16.

        `torch.backends.mkldnn.set_flags(False)` switches packing off.
        """
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
