"""Mixture of experts (Mixtral, Qwen3 MoE): the decoder with experts in place of the MLP, in all or some layers."""

from __future__ import annotations

from model_runner.config import ModelConfig
from model_runner.model.decoders.decoder import Decoder, Layer
from model_runner.model.layers.experts import SparseMLP
from model_runner.model.layers.mlp import FeedForward
from model_runner.model.layers.weights import Weights


class MoeLayer(Layer):
    """A layer with experts where the config gives it experts, else with an MLP."""

    def feed_forward(self, config: ModelConfig, index: int, weights: Weights) -> FeedForward:
        """Creates the layer's experts, or its MLP."""
        assert config.experts is not None
        return (
            SparseMLP(config, index, weights)
            if config.experts.layers[index]
            else super().feed_forward(config, index, weights)
        )


class Moe(Decoder):
    """The decoder whose layers may have experts."""

    layer_type = MoeLayer

    @property
    def capturable(self) -> bool:
        """Whether the decode steps can be captured as CUDA graphs: no layer's experts wait for the device."""
        return not any(isinstance(layer.mlp, SparseMLP) and layer.mlp.needs_host_sync for layer in self.layers)
