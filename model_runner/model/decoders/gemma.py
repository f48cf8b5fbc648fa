"""Gemma 2 and 3: norms before and after attention and MLP, scaled embeddings, and logits with a softcap.

    each layer:  x = x + norm(attention(norm(x)));  x = x + norm(mlp(norm(x)))
    logits = cap * tanh(head(norm(x)) / cap)

Legend: T tokens of the step, S rows that need logits, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from model_runner.config import ModelConfig
from model_runner.model.decoders.decoder import Decoder, Layer, Stream
from model_runner.model.layers.norm import RMSNorm
from model_runner.model.layers.rotary import Rotation
from model_runner.model.layers.weights import Weights
from model_runner.step.batch import Batch


class GemmaLayer(Layer):
    """Attention and MLP, each with a norm before and a norm after it."""

    def read_norms(self, norm: Callable[[str], RMSNorm]) -> None:
        self.attention_norm = norm("input_layernorm")
        self.attended_norm = norm("post_attention_layernorm")
        self.mlp_norm = norm("pre_feedforward_layernorm")
        self.fed_norm = norm("post_feedforward_layernorm")

    def __call__(
        self, x_TH: torch.Tensor, added_TH: torch.Tensor | None, rotate: Rotation | None, batch: Batch
    ) -> Stream:
        normed_TH, x_TH = self.attention_norm.add(x_TH, added_TH, batch)
        attended_TH = self.attended_norm(self.attention(normed_TH, rotate, batch), batch)
        normed_TH, x_TH = self.mlp_norm.add(x_TH, attended_TH, batch)
        return x_TH, self.fed_norm(self.mlp(normed_TH, batch), batch)


class Gemma(Decoder):
    """The decoder with Gemma's layers, embeddings and logits."""

    layer_type = GemmaLayer

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__(config, weights)
        self.scale = float(torch.tensor(config.embed_scale, dtype=weights.dtype))  # rounded to the dtype
        self.cap = config.logit_cap

    def adjust_embeddings(self, x_TH: torch.Tensor) -> torch.Tensor:
        return x_TH * self.scale

    def adjust_logits(self, logits_SV: torch.Tensor) -> torch.Tensor:
        return logits_SV if self.cap is None else torch.tanh(logits_SV / self.cap) * self.cap
