"""Granite: a Llama with multipliers on embeddings, on the addends of each layer, and on logits.

Legend: T tokens of the step, S rows that need logits, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch

from model_runner.config import ModelConfig
from model_runner.model.decoders.decoder import Decoder, Layer, Stream
from model_runner.model.layers.rotary import Rotation
from model_runner.model.layers.weights import Weights
from model_runner.step.batch import Batch


class GraniteLayer(Layer):
    """Attention and MLP, each scaled before it is added to the residual."""

    def __init__(self, config: ModelConfig, index: int, weights: Weights) -> None:
        super().__init__(config, index, weights)
        self.scale = config.residual_scale

    def __call__(
        self, x_TH: torch.Tensor, added_TH: torch.Tensor | None, rotate: Rotation | None, batch: Batch
    ) -> Stream:
        normed_TH, x_TH = self.attention_norm.add(x_TH, added_TH, batch)
        normed_TH, x_TH = self.mlp_norm.add(x_TH, self.attention(normed_TH, rotate, batch) * self.scale, batch)
        return x_TH, self.mlp(normed_TH, batch) * self.scale


class Granite(Decoder):
    """The decoder with Granite's layers, embeddings and logits."""

    layer_type = GraniteLayer

    def adjust_embeddings(self, x_TH: torch.Tensor) -> torch.Tensor:
        return x_TH * self.config.embed_scale

    def adjust_logits(self, logits_SV: torch.Tensor) -> torch.Tensor:
        return logits_SV * self.config.logit_scale
