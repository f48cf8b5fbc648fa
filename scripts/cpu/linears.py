"""Times only the linears of a shape: each weight is read once from memory, with and without packing for oneDNN.

Starts no server; uses torch's threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from bench.shapes import VOCAB, Shape

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def fused(shape: Shape) -> list[tuple[int, int]]:
    """Returns the (in, out) sizes of a layer's matmuls as a server runs them: q, k and v fused, gate and up fused."""
    heads, kv = shape.heads * 64, shape.kv_heads * 64
    return [
        (shape.hidden, heads + 2 * kv),
        (heads, shape.hidden),
        (shape.hidden, 2 * shape.ffn),
        (shape.ffn, shape.hidden),
    ]


def packed(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns the weight packed by oneDNN for an input of `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def multiply_packed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class Linears:
    """The matmuls of all layers over `rows` rows in bfloat16, and the head's matmul over one row."""

    def __init__(self, shape: Shape, rows: int) -> None:
        sizes = fused(shape) * shape.layers
        weights = [torch.randn(out, inner).to(torch.bfloat16) for inner, out in sizes]
        self._x = {inner: torch.randn(rows, inner).to(torch.bfloat16) for inner, _ in sizes}
        self._head = torch.randn(VOCAB, shape.hidden).to(torch.bfloat16)
        self._kinds: list[tuple[Multiply, list[torch.Tensor]]] = [(torch.nn.functional.linear, weights)]
        if torch.backends.mkldnn.is_available():
            self._kinds.append((multiply_packed, [packed(weight, rows) for weight in weights]))
        self._inner = [inner for inner, _ in sizes]

    @torch.inference_mode()
    def seconds(self) -> list[float]:
        """Returns the seconds of one pass with each kind of matmul (plain, and packed if oneDNN is available)."""
        return [self._once(multiply, weights) for multiply, weights in self._kinds]

    def _once(self, multiply: Multiply, weights: list[torch.Tensor]) -> float:
        began = time.perf_counter()
        for inner, weight in zip(self._inner, weights, strict=True):
            multiply(self._x[inner], weight)
        torch.nn.functional.linear(self._x[self._head.shape[1]][:1], self._head)
        return time.perf_counter() - began


def best(passes: list[list[float]]) -> float:
    """Returns the median of the faster kind of matmul, in seconds."""
    return min(statistics.median(kind) for kind in zip(*passes, strict=True))
