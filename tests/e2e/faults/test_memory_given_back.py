"""An unload frees the host memory and the rank pages of its adapter, measured in the runner process and its Stats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures.models.tiny_models import build
from fixtures.processes.resources import shared_bytes
from fixtures.serving.running import RunningServer
from safetensors.torch import save_file

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

HIDDEN, FFN, RANK, ADAPTERS = 1024, 2048, 512, 3


def _write_adapter(directory: Path, seed: int) -> Path:
    """Writes an adapter of rank 512 on the MLP: 19 MB in float32."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, inner, outer in (("gate_proj", HIDDEN, FFN), ("up_proj", HIDDEN, FFN), ("down_proj", FFN, HIDDEN)):
        path = f"base_model.model.model.layers.0.mlp.{name}"
        tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, inner, generator=draw) / inner**0.5
        tensors[f"{path}.lora_B.weight"] = torch.randn(outer, RANK, generator=draw) / RANK
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    config["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _runner(server: RunningServer) -> int:
    """Returns the process id of the model runner."""
    (pid,) = (p for p in server.children() if b"model_runner" in Path(f"/proc/{p}/cmdline").read_bytes())
    return pid


def test_unload_frees_host_memory_and_rank_pages(tmp_path: Path) -> None:
    model = build(
        "llama2",
        tmp_path / "m",
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=1,
    )
    paths = {f"a{number}": _write_adapter(tmp_path / f"a{number}", number) for number in range(ADAPTERS)}
    size = sum((path / "adapter_model.safetensors").stat().st_size for path in paths.values())
    flags = ["--model-path", model, "--dtype", "float32", "--enable-lora", "--max-lora-rank", RANK]
    flags += ["--lora-target-modules", "gate_proj", "up_proj", "down_proj", "--max-loras-per-batch", ADAPTERS]
    with RunningServer(*flags) as server:
        runner = _runner(server)
        before = shared_bytes(runner)
        for name, path in paths.items():
            body = {"lora_name": name, "lora_path": str(path), "preload": True}
            status, answer = server.post("/load_lora_adapter", body)
            assert status == 200, answer
        held = shared_bytes(runner) - before
        stats = server.wait_stats(lambda stats: stats["host_bytes"] >= size * 0.9)  # Stats arrive each second
        assert size * 0.9 < held < size * 1.5
        used = {group: count for group, count in stats["rank_pages_used"].items() if count}
        assert used == {"gate_up": 32 * ADAPTERS, "down": 32 * ADAPTERS}
        for name in paths:
            body = {"input_ids": [3, 4], "lora_path": name, "sampling_params": {"max_new_tokens": 2}}
            assert server.post("/generate", body)[0] == 200
            status, answer = server.post("/unload_lora_adapter", {"lora_name": name})
            assert status == 200, answer
        stats = server.wait_stats(lambda stats: not stats["host_bytes"])
        assert not any(stats["rank_pages_used"].values())
        assert shared_bytes(runner) - before < size * 0.05
