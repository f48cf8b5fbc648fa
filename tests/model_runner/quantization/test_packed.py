"""Packed linears have the products of plain ones, `dequantize` gives the plain values, and whole models use them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.adapters.resident import attach_adapters
from fixtures.models.drive import Driver
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, make_adapter

from model_runner.config import read_model_config
from model_runner.model.load import load_model
from model_runner.quantization.packed import Packed

CPU = torch.device("cpu")
N = 6
needs_packing = pytest.mark.skipif(not Packed.supports(torch.bfloat16, CPU), reason="no bfloat16 in oneDNN here")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_packing)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 32, 33, 130])
def test_packed_linear_equals_the_exact_product(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    wide_TI, weight_OI, bias_O = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 96), (160, 48), (160,))
    )
    x_TI = wide_TI[:, 48:]  # rows that are not adjacent in memory
    for bias in (bias_O, None):
        linear = Packed(weight_OI.clone(), bias)
        linear.finish_loading()
        assert linear.shape == (160, 48)
        assert torch.equal(linear.dequantize(), weight_OI)
        assert torch.equal(linear.dequantize(slice(3, 20)), weight_OI[3:20])
        exact = x_TI.double() @ weight_OI.double().t() + (0 if bias is None else bias.double())
        y_TO = linear.apply(x_TI)
        assert (y_TO.dtype, y_TO.shape) == (dtype, (rows, 160))
        near = 1e-5 if dtype is torch.float32 else 2**-8
        torch.testing.assert_close(y_TO.double(), exact, rtol=near, atol=near * 10)


def test_packing_is_for_bfloat16_on_a_cpu() -> None:
    assert not Packed.supports(torch.float32, CPU)
    assert not Packed.supports(torch.bfloat16, torch.device("cuda"))
    torch._C._set_mkldnn_enabled(False)
    try:
        assert not Packed.supports(torch.bfloat16, CPU)
    finally:
        torch._C._set_mkldnn_enabled(True)


@pytest.mark.parametrize("family", ["llama2", "qwen2", "gemma2", "phi3", "mixtral"])
def test_packed_model_equals_peft(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model(family)
    targets = ["qkv_proj", "gate_up_proj"] if family == "phi3" else ["q_proj", "v_proj", "o_proj"]
    adapters = {
        "dora": make_adapter(path, tmp_path / "dora", seed=1, r=8, alpha=16, targets=targets, use_dora=True),
        "lora": make_adapter(path, tmp_path / "lora", seed=2, r=20, alpha=30, targets=targets),
    }
    oracle = Oracle(path, adapters)
    draw, names = random.Random(5), [None, *adapters]
    asks: list[tuple[list[int], int]] = []
    while len(asks) < 6:
        lane = len(asks) % len(names)
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 20))]
        if oracle.is_unambiguous(prompt, N, names[lane]):
            asks.append((prompt, lane))
    expected = [oracle.greedy(prompt, N, names[lane]) for prompt, lane in asks]
    decoder = load_model(path, read_model_config(path), device=CPU, dtype=torch.float32, method="packed")
    assert all(site.base.weight.is_mkldnn for site in decoder.sites if site.group in ("qkv", "o", "gate_up", "down"))
    prompts, lanes = [prompt for prompt, _ in asks], [lane for _, lane in asks]
    lora = attach_adapters(decoder, adapters)
    assert Driver(decoder, lora=lora, pages=200).greedy(prompts, N, lanes=lanes) == expected
    assert Driver(decoder, lora=lora, pages=200).greedy(prompts, N, lanes=lanes, chunk=5) == expected
