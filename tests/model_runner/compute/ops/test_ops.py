"""The small operations: torch is bit-equal to transformers, triton kernels are near torch, rows are independent."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from fixtures.models.ahead_of_time import compile_for
from fixtures.models.attention_cases import KERNELS
from torch.nn.functional import gelu, silu

from model_runner.compute.kernels.triton.gated import gated_kernel
from model_runner.compute.kernels.triton.norm import KINDS, norm_kernel
from model_runner.compute.kernels.triton.rope import rope_kernel
from model_runner.compute.kernels.triton.store_kv import store_kv_kernel
from model_runner.compute.ops.base import HeadNorms, NormKind, Ops, create
from model_runner.compute.ops.torch_ops import TorchOps
from model_runner.compute.ops.triton_ops import TritonOps

EPS = 1e-5
TORCH, TRITON = TorchOps(), TritonOps()
DTYPES = {torch.float32: 2e-6, torch.float16: 4e-3}
KIND_NAMES: tuple[NormKind, ...] = get_args(NormKind)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(KERNELS, dtype)


def angles(tokens: int, half: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    radians = random(tokens, 1, half, seed=9) * 3
    return radians.cos().to(dtype), radians.sin().to(dtype)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, atol=DTYPES[got.dtype], rtol=DTYPES[got.dtype])


def transformers_norm(kind: NormKind, weight: torch.Tensor) -> torch.nn.Module:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    kinds = {"plain": LlamaRMSNorm, "wide": Olmo2RMSNorm, "gemma": Gemma2RMSNorm}
    layer: torch.nn.Module = kinds[kind](len(weight), eps=EPS)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def transformers_rope(x_TND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    both = (torch.cat((angle, angle), dim=-1)[:, 0] for angle in (cos, sin))
    rotated: torch.Tensor = apply_rotary_pos_emb(x_TND, x_TND, *both)[0]
    return rotated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_torch_norms_are_bit_equal_to_transformers(kind: NormKind, dtype: torch.dtype) -> None:
    x, residual, weight = (
        random(5, 24, dtype=dtype),
        random(5, 24, dtype=dtype, seed=1),
        random(24, dtype=dtype, seed=2),
    )
    reference = transformers_norm(kind, weight)
    assert torch.equal(TORCH.norm(x, weight, EPS, kind), reference(x))
    normed, total = TORCH.add_norm(x, residual, weight, EPS, kind)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, reference(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [4, 3])
def test_torch_rope_and_gates_are_bit_equal_to_transformers(half: int, dtype: torch.dtype) -> None:
    x, (cos, sin) = random(5, 3, 8, dtype=dtype), angles(5, half, dtype)
    rotated = transformers_rope(x[..., : 2 * half], cos, sin)
    assert torch.equal(TORCH.rope(x, cos, sin), torch.cat((rotated, x[..., 2 * half :]), dim=-1))
    gate_up = random(5, 12, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert torch.equal(TORCH.silu_mul(gate_up), silu(gate) * up)
    assert torch.equal(TORCH.gelu_tanh_mul(gate_up), gelu(gate, approximate="tanh") * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("size", [64, 80, 200])
def test_triton_norms_are_near_torch(size: int, kind: NormKind, dtype: torch.dtype) -> None:
    x, residual = random(7, size, dtype=dtype), random(7, size, dtype=dtype, seed=1)
    weight = random(size, dtype=dtype, seed=2)
    assert_near(TRITON.norm(x, weight, EPS, kind), TORCH.norm(x, weight, EPS, kind))
    got, expected = (ops.add_norm(x, residual, weight, EPS, kind) for ops in (TRITON, TORCH))
    assert_near(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_each_row_has_the_norm_of_its_lane(kind: NormKind) -> None:
    x, residual, heads = random(7, 80), random(7, 80, seed=1), random(7, 9, 24, seed=2)[:, 2:7]
    tables, lanes = random(4, 200, seed=3), torch.tensor([0, 3, 1, 3, 2, 0, 1], device=KERNELS)
    table, narrow = tables[:, 96:176], tables[:, 8:32]
    for ops in (TRITON, TORCH):
        got, total = ops.add_norm(x, residual, table, EPS, kind, lanes)
        for row, lane in enumerate(lanes.tolist()):
            here = slice(row, row + 1)
            assert_near(ops.norm(x, table, EPS, kind, lanes)[here], TORCH.norm(x[here], table[lane], EPS, kind))
            assert_near(got[here], TORCH.norm(x[here] + residual[here], table[lane], EPS, kind))
            assert_near(
                ops.norm(heads, narrow, EPS, kind, lanes)[here], TORCH.norm(heads[here], narrow[lane], EPS, kind)
            )
        assert torch.equal(total, x + residual)


@pytest.mark.parametrize(("heads", "kv_heads", "size", "half"), [(4, 2, 16, 8), (6, 1, 24, 6)])
def test_heads_of_each_token_have_the_norms_of_its_lane(heads: int, kv_heads: int, size: int, half: int) -> None:
    qkv, (cos, sin) = random(5, heads + 2 * kv_heads, size), angles(5, half, torch.float32)
    tables, lanes = random(3, 100, seed=3), torch.tensor([2, 0, 1, 2, 0], device=KERNELS)
    q_table, k_table = tables[:, 8 : 8 + size], tables[:, 40 : 40 + size]
    slots = torch.tensor([9, 3, 0, 23, 8], dtype=torch.int32, device=KERNELS)

    def results(ops: Ops, picked: slice, norms: HeadNorms) -> tuple[torch.Tensor, torch.Tensor]:
        caches = torch.zeros(2, 6, 4, kv_heads, size, device=KERNELS)
        here = qkv[picked], cos[picked], sin[picked], caches[0], caches[1], slots[picked]
        return ops.rope_and_store(*here, norms), caches

    for ops in (TRITON, TORCH):
        q, caches = results(ops, slice(None), HeadNorms(q_table, k_table, EPS, "plain", lanes))
        for row, lane in enumerate(lanes.tolist()):
            alone, cache = results(TORCH, slice(row, row + 1), HeadNorms(q_table[lane], k_table[lane], EPS))
            assert_near(q[row], alone[0])
            slot = int(slots[row])
            assert_near(caches.flatten(1, 2)[:, slot].contiguous(), cache.flatten(1, 2)[:, slot].contiguous())


def test_norms_of_heads_inside_a_wider_tensor() -> None:
    qkv, weight = random(6, 9, 24), random(24, seed=1)
    for heads in (qkv[:, :5], qkv[:, 5:7]):
        assert_near(TRITON.norm(heads, weight, EPS), TORCH.norm(heads, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [16, 1025])
def test_triton_gates_are_near_torch(inner: int, dtype: torch.dtype) -> None:
    wider = random(7, 2 * inner + 3, dtype=dtype) * 2
    gate_up = wider[:, : 2 * inner]
    assert_near(TRITON.silu_mul(gate_up), TORCH.silu_mul(gate_up))
    assert_near(TRITON.gelu_tanh_mul(gate_up), TORCH.gelu_tanh_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "half"), [(16, 8), (80, 40), (24, 12), (64, 8), (20, 5)])
def test_triton_rope_is_near_torch(size: int, half: int, dtype: torch.dtype) -> None:
    qkv, (cos, sin) = random(7, 8, size, dtype=dtype), angles(7, half, dtype)
    assert_near(TRITON.rope(qkv[:, :6], cos, sin), TORCH.rope(qkv[:, :6], cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, *KIND_NAMES])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "half"), [(4, 2, 16, 8), (6, 1, 24, 6), (3, 3, 20, 10)])
def test_triton_rope_and_store_is_near_torch(
    heads: int, kv_heads: int, size: int, half: int, kind: NormKind | None, dtype: torch.dtype
) -> None:
    qkv, (cos, sin) = random(5, heads + 2 * kv_heads, size, dtype=dtype), angles(5, half, dtype)
    weights = random(size, dtype=dtype, seed=3), random(size, dtype=dtype, seed=4)
    norms = None if kind is None else HeadNorms(*weights, EPS, kind)
    slots = torch.tensor([9, 3, 0, 23, 8], dtype=torch.int32, device=KERNELS)
    results = []
    for ops in (TRITON, TORCH):
        caches = torch.full((2, 6, 4, kv_heads, size), 7.0, dtype=dtype, device=KERNELS)
        results.append((ops.rope_and_store(qkv, cos, sin, caches[0], caches[1], slots, norms), caches))
    (q, caches), (expected, expected_caches) = results
    assert_near(q, expected)
    assert_near(caches, expected_caches)
    assert torch.equal(caches[1], expected_caches[1])
    untouched = [slot for slot in range(24) if slot not in slots.tolist()]
    assert (caches[:, :].flatten(1, 2)[:, untouched] == 7.0).all()


def test_nan_stays_in_its_row() -> None:
    x, residual, weight, (cos, sin) = (
        random(5, 64),
        random(5, 64, seed=1),
        random(64, seed=2),
        angles(5, 8, torch.float32),
    )

    def results(x: torch.Tensor) -> list[torch.Tensor]:
        caches = torch.zeros(2, 3, 4, 1, 16, device=KERNELS)
        slots = torch.arange(5, dtype=torch.int32, device=KERNELS)
        q = TRITON.rope_and_store(x.view(5, 4, 16), cos, sin, caches[0], caches[1], slots)
        stored = caches.flatten(1, 2)[:, :5].transpose(0, 1)
        return [TRITON.norm(x, weight, EPS), *TRITON.add_norm(x, residual, weight, EPS), TRITON.silu_mul(x), q, stored]

    dirty = x.clone()
    dirty[2] = torch.nan
    for clean, poisoned in zip(results(x), results(dirty), strict=True):
        assert poisoned[2].isnan().all()
        poisoned[2] = clean[2]
        assert torch.equal(poisoned, clean)


def test_ops_of_a_cpu_extend_the_torch_reference() -> None:
    assert isinstance(create(torch.device("cpu")), TorchOps)
    assert isinstance(create(torch.device("cuda")), TritonOps)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_spills(capability: int) -> None:
    """Compiles for the sizes of an 8B model: hidden 4096, inner 14336, 32 and 8 heads of 128."""
    pages = {"page_stride": "i32", "slot_stride": "i32"}
    caches = dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), "*bf16")
    names = ("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "total_ptr")
    norms = {**dict.fromkeys(names, "*bf16"), "rows": "i32", "eps": "fp32"}
    norms |= {"lanes_ptr": "*i64", **dict.fromkeys(("token_stride", "row_stride", "weight_stride"), "i32")}
    sizes = {"N": 1, "H": 4096, "BLOCK_R": 1, "BLOCK_H": 4096, "ADD": True, "KIND": KINDS["plain"]}
    gates = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "tokens": "i32", "token_stride": "i32"}
    names = ("x_ptr", "cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr", "out_ptr")
    ropes = {**dict.fromkeys(names, "*bf16"), **caches, "slots_ptr": "*i32", **pages}
    ropes |= {"tokens": "i32", "token_stride": "i32", "eps": "fp32", "weight_stride": "i32", "lanes_ptr": "*i64"}
    heads = {"N": 32, "K": 8, "D": 128, "HALF": 64, "PAGE": 16, "ROWS": 16, "BLOCK_E": 64, "BLOCK_S": 1}
    stores = {**dict.fromkeys(("k_ptr", "v_ptr"), "*bf16"), **caches, "slots_ptr": "*i32", **pages}
    stores |= dict.fromkeys(("tokens", "k_stride", "v_stride"), "i32")
    strides = ("token_stride", "page_stride", "slot_stride", "weight_stride")
    compiled = [
        *(
            compile_for(norm_kernel, norms, {**sizes, "LANES": own}, capability, aligned=strides)
            for own in (False, True)
        ),
        compile_for(gated_kernel, gates, {"I": 14336, "BLOCK_T": 1, "BLOCK_I": 1024, "GELU": False}, capability),
        compile_for(store_kv_kernel, stores, {"E": 1024, "BLOCK_E": 1024, "PAGE": 16, "BLOCK_T": 1}, capability),
    ]
    for normed, own in ((False, False), (True, False), (True, True)):
        variant = {**heads, "NORM": normed, "KIND": 0, "STORE": True, "LANES": own}
        compiled.append(compile_for(rope_kernel, ropes, variant, capability, aligned=strides))
    assert [one.spills for one in compiled] == [0] * 7
