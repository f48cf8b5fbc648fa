"""An 8B-shaped Llama without a checkpoint: a config on disk, weights drawn on the device, adapters that share values.

Everything else is the same runner that serves requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.config.process_configs import Endpoints, RunnerConfig
from engine.messages import Footprint
from model_runner.build import assembly
from model_runner.config import ModelConfig
from model_runner.lora.normal_form import Delta, NormalForm, footprint
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.layers.weights import Weights
from model_runner.model.load import build_decoder
from model_runner.platform.shard import Shard
from model_runner.quantization.base import find
from model_runner.runner import Runner

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def load(directory: Path, **options: Any) -> Runner:
    """Loads a runner of this shape with random weights; `options` are fields of its config."""
    (directory / "config.json").write_text(json.dumps({**CONFIG, **options.pop("shape", {})}))
    endpoints = Endpoints(tokenizer="", scheduler="", runner="", zmq_server="")
    with _random_weights():
        return Runner.load(RunnerConfig(endpoints=endpoints, model_path=str(directory), **options))


def host_adapters(runner: Runner, count: int, rank: int) -> Footprint:
    """Puts `count` adapters into the host cache, with ids from 1, that share their values. Returns their footprint."""
    lora = runner.parts.lora
    assert lora is not None
    made = _adapter(runner, rank)
    for number in range(1, count + 1):
        lora.store._adapters[number] = replace(made, adapter_id=number)
    return made.footprint


def _adapter(runner: Runner, rank: int) -> NormalForm:
    """Returns an adapter on all linears with random values."""
    parts = runner.parts
    assert parts.lora is not None
    draw = torch.Generator().manual_seed(rank)
    dtype = parts.lora.pages.dtype

    def noise(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw) / columns**0.5 / 8).to(dtype)

    sites = [site for site in parts.decoder.sites if parts.lora.pages.page_counts.get(site.group)]
    deltas = {
        site.name: tuple(Delta(noise(rank, site.in_features), noise(rank, piece.width)) for piece in site.slices)
        for site in sites
    }
    return NormalForm(
        adapter_id=1,
        name="random",
        revision="random",
        rank=rank,
        targets=[],
        footprint=footprint(deltas, {site.name: site for site in sites}),
        deltas=deltas,
        bytes=sum(delta.bytes for slices in deltas.values() for delta in slices),
    )


@contextmanager
def _random_weights() -> Iterator[None]:
    """While entered, models get random weights instead of those of a checkpoint."""
    read = assembly.load_model
    assembly.load_model = _make_model
    try:
        yield
    finally:
        assembly.load_model = read


def _make_model(
    path: Path,
    model_config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shard: Shard | None = None,
    method: str = "plain",
    progress: bool = False,
) -> Decoder:
    decoder = build_decoder(model_config, Weights(device, dtype, shard or Shard(), find(method)))
    draw = torch.Generator(device=device).manual_seed(0)
    for placement in decoder.weights.placements:
        if "norm" in placement.name:
            placement.into.fill_(1.0)
        else:
            placement.into.normal_(0.0, placement.into.shape[-1] ** -0.5, generator=draw)
    decoder.finish_loading()
    return decoder
