"""vLLM's LoRA kernels as a column: its Triton shrink and expand, from files extracted out of its wheel.

Written against 0.33.0. Weights are padded to the largest rank, one tensor a slice; the kernels get the number of
active adapters, as in vLLM's CUDA graphs that are captured for each number of active adapters.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from gpu.case import Case, Run
from gpu.columns.stubs import Stub, StubFinder

FILES = ("vllm/lora/ops/triton_ops/",)


class _Platform:
    """The methods of vLLM's platform that the files call."""

    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    is_cuda_alike = is_cuda

    def has_device_capability(self, least: int) -> bool:
        major, minor = torch.cuda.get_device_capability()
        return major * 10 + minor >= least

    def is_device_capability(self, exact: int) -> bool:
        major, minor = torch.cuda.get_device_capability()
        return major * 10 + minor == exact

    def get_device_name(self) -> str:
        return torch.cuda.get_device_name()


def install(root: Path) -> None:
    """Makes vLLM's files importable."""
    settings = {"VLLM_BATCH_INVARIANT": False, "VLLM_TUNED_CONFIG_FOLDER": None, "VLLM_LORA_DISABLE_PDL": False}
    given = {
        "vllm": {"envs": SimpleNamespace(**settings)},
        "vllm.triton_utils": {"triton": triton, "tl": tl, "HAS_TRITON": True},
        "vllm.logger": {"init_logger": lambda name: Stub()},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.utils.math_utils": {"next_power_of_2": lambda value: 1 << max(0, value - 1).bit_length()},
        "vllm.utils.torch_utils": {
            "async_tensor_h2d": lambda data, dtype, device: torch.tensor(data, dtype=dtype).to(device),
            "direct_register_custom_op": lambda **_: None,
        },
    }
    StubFinder("vllm", root, given).install()


def punica(case: Case) -> Run:
    """Prepares a shrink into float32, then an expand into the base's output."""
    from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

    tokens, slices, most = case.point.tokens, len(case.site.slices), case.max_rank
    meta = LoRAKernelMeta.make(case.point.lanes, tokens, case.device)
    meta.prepare_tensors(torch.tensor(case.point.lane_of_token, dtype=torch.int32, device=case.device))
    step = meta.meta_args(tokens, True)
    packed = [_pack(case, copy) for copy in range(len(case.copies))]
    h = torch.empty(slices, tokens, most, dtype=torch.float32, device=case.device)

    def run(copy: int) -> torch.Tensor:
        a, b = packed[copy]
        y_TO = case.base(copy)
        _lora_shrink(case.x_TI, a, h, *step, 1.0)
        _lora_expand(h, b, y_TO, *step, 0, True)
        return y_TO

    return run


def _pack(case: Case, copy: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns for each slice A [adapters, 1, R, in] and B [adapters, 1, out of the slice, R]."""
    most, lanes, how = case.max_rank, case.point.lanes, {"dtype": case.x_TI.dtype, "device": case.device}
    a = [torch.zeros(lanes, 1, most, case.site.inputs, **how) for _ in case.site.slices]
    b = [torch.zeros(lanes, 1, width, most, **how) for width in case.site.slices]
    for lane, (a_slices, b_Or) in enumerate(case.copies[copy]):
        rank = b_Or.shape[1]
        for index, a_rI in enumerate(a_slices):
            a[index][lane, 0, :rank] = a_rI
            b[index][lane, 0, :, :rank] = b_Or[case.offsets[index] : case.offsets[index + 1]]
    return a, b
