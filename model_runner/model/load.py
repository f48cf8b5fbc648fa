"""Builds the decoder of a model directory, of the class that its ModelConfig names, and loads its weights."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from engine.processes.busy_timer import BusyTimer
from model_runner.config import ModelConfig
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.layers.weights import Weights
from model_runner.platform.shard import Shard
from model_runner.quantization.base import find
from model_runner.weights.checkpoint import load_checkpoint


def build_decoder(config: ModelConfig, weights: Weights) -> Decoder:
    """Builds the decoder of `config`, with uninitialised weights."""
    module, _, name = config.decoder_class.partition(":")
    decoder: Decoder = getattr(importlib.import_module(module), name)(config, weights)
    return decoder


def load_model(
    path: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shard: Shard | None = None,
    method: str = "plain",
    progress: BusyTimer | None = None,
) -> Decoder:
    """Builds the decoder of `config` and loads the directory's weights, cast to `dtype`, linears stored by `method`.

    Raises a ConfigError that says what is wrong with the weights.
    """
    decoder = build_decoder(config, Weights(device, dtype, shard or Shard(), find(method)))
    harmless = ["lm_head.weight"] if config.tie_embeddings else []
    load_checkpoint(path, decoder.weights.placements, harmless, progress=progress)
    decoder.finish_loading()
    return decoder
