"""OLMo 2: norms after attention and MLP instead of before, and q and k each normed over all heads at once.

    each layer:  x = x + norm(attention(x));  x = x + norm(mlp(x))

Legend: T tokens of the step, H hidden size, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.errors import ConfigError
from model_runner.config import ModelConfig
from model_runner.model.decoders.decoder import Decoder, Layer, Stream
from model_runner.model.layers.attention import Attention
from model_runner.model.layers.norm import RMSNorm, read_norm
from model_runner.model.layers.rotary import Rotation
from model_runner.model.layers.weights import Weights
from model_runner.step.batch import Batch


class Olmo2Attention(Attention):
    """Attention whose norms of q and k are each over all heads at once."""

    norms_by_head = False

    def read_norms(self, config: ModelConfig, weights: Weights, path: str) -> tuple[RMSNorm, RMSNorm]:
        """Creates the norms of q and k, each over all heads."""
        if weights.shard.size > 1:
            raise ConfigError(f"--tp-size {weights.shard.size}: OLMo 2 norms q and k over all heads; use --tp-size 1")
        return (
            read_norm(config, weights, f"{path}.q_norm", config.num_heads * config.head_dim),
            read_norm(config, weights, f"{path}.k_norm", config.num_kv_heads * config.head_dim),
        )

    def norm(self, qk_TND: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm, batch: Batch) -> torch.Tensor:
        """Norms q and k, which are side by side in `qk_TND`, each as one vector over all heads."""
        q, k = qk_TND[:, : self.heads].flatten(1), qk_TND[:, self.heads :].flatten(1)
        return torch.cat((q_norm(q, batch), k_norm(k, batch)), dim=1).view(qk_TND.shape)


class Olmo2Layer(Layer):
    """Attention and MLP, each followed by its norm and added to the residual."""

    attention_type = Olmo2Attention

    def read_norms(self, norm: Callable[[str], RMSNorm]) -> None:
        self.attended_norm = norm("post_attention_layernorm")
        self.fed_norm = norm("post_feedforward_layernorm")

    def __call__(
        self, x_TH: torch.Tensor, added_TH: torch.Tensor | None, rotate: Rotation | None, batch: Batch
    ) -> Stream:
        x_TH = x_TH if added_TH is None else x_TH + added_TH  # no norm comes before attention
        x_TH = x_TH + self.attended_norm(self.attention(x_TH, rotate, batch), batch)
        return x_TH, self.fed_norm(self.mlp(x_TH, batch), batch)


class Olmo2(Decoder):
    """The decoder with OLMo 2's layers."""

    layer_type = Olmo2Layer
