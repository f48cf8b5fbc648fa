"""The decoder: the model of most families, built from a ModelConfig; other families subclass it. The attention backend
and LoRA are attached later.

    x = embed(tokens)
    each layer:  x = x + attention(norm(x));  x = x + mlp(norm(x))
    logits = head(norm(x))

A sum and the norm that follows it are one operation, so a layer returns its last addend beside x, and the next layer
adds it:

    x, added  ->  norm(x + added)  ->  attention  ->  norm(x + its output)  ->  mlp  ->  x, the mlp's output

Does not depend on files, requests or sampling. Legend: T tokens of the step, S rows that need logits, H hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from model_runner.compute.attention.base import AttentionBackend
from model_runner.config import ModelConfig
from model_runner.lora.backends.base import LoraBackend
from model_runner.lora.pool.full_weights import LaneIndices
from model_runner.lora.site import Site
from model_runner.model.layers.attention import Attention
from model_runner.model.layers.embedding import Embedding, Head, read_head
from model_runner.model.layers.linear import Linear
from model_runner.model.layers.mlp import MLP, FeedForward
from model_runner.model.layers.norm import RMSNorm, read_norm
from model_runner.model.layers.rotary import Rotary, Rotation
from model_runner.model.layers.weights import Weights
from model_runner.quantization.plain import Plain
from model_runner.step.batch import Batch
from model_runner.step.kv_pool import KvPool

Stream = tuple[torch.Tensor, torch.Tensor | None]
"""The residual x [T, H], and the addend that is still to be added to it (None: nothing)."""


class Layer:
    """Attention and MLP, each preceded by its norm and added to the residual."""

    attention_type: type[Attention] = Attention

    def __init__(self, config: ModelConfig, index: int, weights: Weights) -> None:
        self.attention = self.attention_type(config, index, weights)
        self.mlp = self.feed_forward(config, index, weights)
        self.norms = list(self.attention.norms or ())

        def norm(name: str) -> RMSNorm:
            self.norms.append(read_norm(config, weights, f"model.layers.{index}.{name}", config.hidden_size))
            return self.norms[-1]

        self.read_norms(norm)

    def feed_forward(self, config: ModelConfig, index: int, weights: Weights) -> FeedForward:
        """Creates the part after attention; subclasses may override it."""
        return MLP(config, index, weights)

    def read_norms(self, norm: Callable[[str], RMSNorm]) -> None:
        """Creates the layer's norms by calling `norm` with their names in the checkpoint."""
        self.attention_norm = norm("input_layernorm")
        self.mlp_norm = norm("post_attention_layernorm")

    def linears(self) -> Iterator[Linear]:
        """Yields qkv, o, and the linears of the MLP or experts."""
        yield from (self.attention.qkv, self.attention.o, *self.mlp.linears())

    def __call__(
        self, x_TH: torch.Tensor, added_TH: torch.Tensor | None, rotate: Rotation | None, batch: Batch
    ) -> Stream:
        """Computes the layer: takes the former layer's Stream and returns its own."""
        normed_TH, x_TH = self.attention_norm.add(x_TH, added_TH, batch)
        normed_TH, x_TH = self.mlp_norm.add(x_TH, self.attention(normed_TH, rotate, batch), batch)
        return x_TH, self.mlp(normed_TH, batch)


class Decoder:
    """A model, built with uninitialised weights; `weights.placements` lists the checkpoint tensors that fill them.

    A family whose forward differs has a subclass with its own layers (`layer_type`) or its own treatment of embeddings
    and logits (`adjust_embeddings`, `adjust_logits`).
    """

    layer_type: type[Layer] = Layer

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        table = weights.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.embed = Embedding(table)
        self.layers = [self.layer_type(config, index, weights) for index in range(config.num_layers)]
        self.norm = read_norm(config, weights, "model.norm", config.hidden_size)
        self.head = Head(Plain(table), tied=True) if config.tie_embeddings else read_head(weights, *table.shape)
        ropes = list(dict.fromkeys(rope for rope in config.ropes if rope is not None))
        self.rotaries = [Rotary(rope, config.head_dim, weights.device, weights.dtype) for rope in ropes]
        self.rotary_indices = [None if rope is None else ropes.index(rope) for rope in config.ropes]

    @property
    def sites(self) -> list[Site]:
        """The sites (modules that adapters may change), in the order of the forward, with the norms last."""
        linears = [linear.site for layer in self.layers for linear in layer.linears()]
        return [self.embed.site, *linears, self.head.site, *(norm.site for norm in self.norms)]

    @property
    def norms(self) -> list[RMSNorm]:
        """All norms, in the order of the forward."""
        return [*(norm for layer in self.layers for norm in layer.norms), self.norm]

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights on this rank."""
        return self.weights.bytes

    @property
    def capturable(self) -> bool:
        """Whether the decode steps can be captured as CUDA graphs, that is, nothing in them waits for the device."""
        return True

    def finish_loading(self) -> None:
        """Converts the loaded weights into the form in which they are served. No weights can be loaded afterwards.

        The linears are converted one after the other, so that at most one is in memory twice.
        """
        self.weights.placements.clear()
        for site in self.sites:
            site.base.finish_loading()

    def attach(self, attention: AttentionBackend, pool: KvPool, lora: LoraBackend | None = None) -> None:
        """Attaches the attention backend and the KV cache to every layer, and the LoRA backend where there is one."""
        self.embed.lora = self.head.lora = lora
        for index, layer in enumerate(self.layers):
            layer.attention.attach(attention, pool.layer(index))
            for linear in layer.linears():
                linear.lora = lora
        for norm in self.norms:
            norm.attach(lora.pages.norms if lora else None)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Returns the normed hidden state [T, H] of every token of the step. Stores K and V in the cache."""
        rotations = [rotary(batch.positions_T) for rotary in self.rotaries]
        x_TH = self.adjust_embeddings(self.embed(batch.tokens_T, batch.lora, batch.lanes_T))
        added_TH: torch.Tensor | None = None
        for layer, index in zip(self.layers, self.rotary_indices, strict=True):
            x_TH, added_TH = layer(x_TH, added_TH, None if index is None else rotations[index], batch)
        return self.norm.add(x_TH, added_TH, batch)[0]

    def adjust_embeddings(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Returns the input of the first layer, made from the embeddings; here they are unchanged."""
        return x_TH

    def logits(self, hidden_SH: torch.Tensor, lora: Any = None, lanes_S: LaneIndices | None = None) -> torch.Tensor:
        """Returns the logits [S, V], in float32, for these rows of `forward`'s output.

        `lora` is the backend's plan for these rows. `lanes_S` are their lanes if a lane has a full head, else None.
        """
        logits_SV = self.adjust_logits(self.head(hidden_SH, lora, lanes_S))
        if lanes_S is not None:
            self.head.mask(logits_SV, lanes_S)
        return logits_SV

    def adjust_logits(self, logits_SV: torch.Tensor) -> torch.Tensor:
        """Returns the logits for the sampler, made from the head's output; here they are unchanged."""
        return logits_SV
