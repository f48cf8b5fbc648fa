"""SGLang's LoRA kernels as columns: csgmv, triton and triton_v2, from files extracted out of its wheel.

Written against 0.5.23. Weights are padded to the largest rank, as its pools are; A's rows are packed at the adapter's
own rank. A step is described as SGLang's backends describe it; csgmv's chunk sizes follow its rule for a flag of 128.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu.case import Case, Run
from gpu.columns.stubs import StubFinder

FILES = (
    "sglang/kernels/ops/lora/dense/",
    "sglang/kernels/ops/lora/common/",
    "sglang/kernels/ops/lora/moe/virtual_experts.py",
    "sglang/srt/lora/dense/",
    "sglang/srt/lora/workspace.py",
    "sglang/srt/lora/utils.py",
)


def install(root: Path) -> None:
    """Makes SGLang's files importable."""
    given = {
        "sglang.srt.utils": {
            "cached_triton_kernel": lambda key=None: lambda kernel: kernel,
            "get_device_name": lambda *_: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": object},
        "sglang.kernels.jit.utils": {
            "is_arch_support_pdl": lambda: torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
        },
    }
    StubFinder("sglang", root, given).install()


def csgmv(case: Case) -> Run:
    """Prepares SGLang's default backend: tokens sorted by adapter, in chunks of one adapter each."""
    from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import chunked_sgmv_lora_expand_forward as expand
    from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import chunked_sgmv_lora_shrink_forward as shrink

    tokens = case.point.tokens
    size = 128 if tokens >= 256 else 32 if tokens >= 64 else 16
    batch = _batch(case, size)
    packed = [_pack(case, copy) for copy in range(len(case.copies))]
    offsets = torch.tensor(case.offsets, dtype=torch.int32)
    on_device, widest = offsets.to(case.device), max(case.site.slices)

    def run(copy: int) -> torch.Tensor:
        a, b = packed[copy]
        y_TO = case.base(copy)
        h = shrink(case.x_TI, a, batch, len(case.site.slices))
        expand(h, b, batch, on_device, widest, y_TO, offsets)
        return y_TO

    return run


def triton(case: Case) -> Run:
    """Prepares segments by request, or by adapter for decodes; each kind of site has its own kernel."""
    from sglang.kernels.ops.lora.dense.gate_up_lora_b import gate_up_lora_b_fwd
    from sglang.kernels.ops.lora.dense.qkv_lora_b import qkv_lora_b_fwd
    from sglang.kernels.ops.lora.dense.sgemm_lora_a import sgemm_lora_a_fwd
    from sglang.kernels.ops.lora.dense.sgemm_lora_b import sgemm_lora_b_fwd

    batch = _batch(case, None)
    packed = [_pack(case, copy) for copy in range(len(case.copies))]
    slices, offsets = case.site.slices, torch.tensor(case.offsets, dtype=torch.int32, device=case.device)

    def run(copy: int) -> torch.Tensor:
        a, b = packed[copy]
        y_TO = case.base(copy)
        h = sgemm_lora_a_fwd(case.x_TI, a, batch, len(slices))
        if len(slices) == 3:
            qkv_lora_b_fwd(h, b, batch, offsets, max(slices), y_TO)
        elif len(slices) == 2:
            gate_up_lora_b_fwd(h, b, batch, slices[0], y_TO)
        else:
            sgemm_lora_b_fwd(h, b, batch, y_TO)
        return y_TO

    return run


def triton_v2(case: Case) -> Run:
    """SGLang's newest backend: tiles from tuned tables; most decodes shrink on a side stream beside the GEMM."""
    from sglang.srt.lora.dense.plan import DenseLoraKind
    from sglang.srt.lora.dense.runner import DenseLoraRunner
    from sglang.srt.lora.utils import Phase
    from sglang.srt.lora.workspace import LoraWorkspace

    runner = DenseLoraRunner(LoraWorkspace(), max_loras=case.point.lanes, device=case.device)
    packed = [_pack(case, copy) for copy in range(len(case.copies))]
    step = {
        "token_slots": torch.tensor(case.point.lane_of_token, dtype=torch.int32, device=case.device),
        "lora_ranks": torch.tensor(case.point.ranks, dtype=torch.int32, device=case.device),
        "scalings": torch.ones(case.point.lanes, device=case.device),
    }

    def run(copy: int) -> torch.Tensor:
        if copy == 0:  # a forward begins: the routing is computed once for all layers
            phase = Phase.DECODE if case.point.decodes else Phase.PREFILL
            graph_mode = case.device.type == "cuda"
            runner.begin_batch(**step, num_tokens=case.point.tokens, phase=phase, graph_mode=graph_mode)
        a, b = packed[copy]
        outputs = case.site.outputs
        plan = runner.plan_for(
            DenseLoraKind.LINEAR, case.max_rank, case.site.inputs, outputs, num_tokens=case.point.tokens
        )
        y_TO: torch.Tensor = runner.apply(
            case.x_TI, lambda: case.base(copy), plan, a=a, b=b, offsets=tuple(case.offsets)
        )
        return y_TO

    return run


def _pack(case: Case, copy: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A [adapters, slices * R, in] with each adapter's slices concatenated, B [adapters, out, R]."""
    most, slices, dtype = case.max_rank, len(case.site.slices), case.x_TI.dtype
    a = torch.zeros(case.point.lanes, slices * most, case.site.inputs, dtype=dtype, device=case.device)
    b = torch.zeros(case.point.lanes, case.site.outputs, most, dtype=dtype, device=case.device)
    for lane, (a_slices, b_Or) in enumerate(case.copies[copy]):
        rank = b_Or.shape[1]
        a[lane, : slices * rank] = torch.cat(a_slices)
        b[lane, :, :rank] = b_Or
    return a, b


def _batch(case: Case, chunk: int | None) -> Any:
    """Returns SGLang's batch info: runs of one adapter in sorted order, cut into chunks if a size is given."""
    lanes = torch.tensor(case.point.lane_of_token)
    order = torch.argsort(lanes, stable=True)
    counts = torch.bincount(lanes, minlength=case.point.lanes).tolist()
    lengths, owners = [], []
    for lane, count in enumerate(counts):
        for begin in range(0, count, chunk or max(1, count)):
            lengths.append(min(chunk or count, count - begin))
            owners.append(lane)
    ends = torch.tensor([0, *lengths]).cumsum(0)

    def ints(values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32).to(case.device)

    return SimpleNamespace(
        use_cuda_graph=False,
        bs=len(lengths),
        num_segments=len(lengths),
        seg_indptr=ints(ends),
        seg_lens=ints(lengths),
        weight_indices=ints(owners),
        lora_ranks=ints(case.point.ranks),
        scalings=torch.ones(case.point.lanes, device=case.device),
        max_len=chunk or max(lengths),
        permutation=ints(order),
        expected_tokens=case.point.tokens,
        has_active_lora=True,
        is_prefill=not case.point.decodes,
    )
