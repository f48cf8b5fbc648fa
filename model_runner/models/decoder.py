"""The decoder: every family's model, read from an Arch. Attention and LoRA are attached from outside.

    x = embed(tokens)
    each layer:  x = x + attention(norm(x));  x = x + mlp(norm(x))
    logits = head(norm(x))

Knows nothing of files, requests or sampling. Legend: T tokens of the step, S rows that need logits, H hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from model_runner.arch import Arch
from model_runner.attention.base import AttentionBackend
from model_runner.batch import Batch
from model_runner.kv_pool import KvPool
from model_runner.layers.attention import Attention
from model_runner.layers.embedding import Embedding, Head
from model_runner.layers.linear import Linear
from model_runner.layers.mlp import MLP
from model_runner.layers.norm import RMSNorm
from model_runner.layers.rotary import Rotary, Rotation
from model_runner.layers.weights import Weights
from model_runner.lora.base import LoraBackend
from model_runner.lora.site import Site


class Layer:
    """Attention and MLP, each behind its norm and beside its residual."""

    def __init__(self, arch: Arch, index: int, weights: Weights) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights.tensor(f"model.layers.{index}.{name}.weight", arch.hidden_size), arch.norm_eps)

        self.attention_norm = norm("input_layernorm")
        self.attention = Attention(arch, index, weights)
        self.mlp_norm = norm("post_attention_layernorm")
        self.mlp = MLP(arch, index, weights)

    def linears(self) -> Iterator[Linear]:
        """Its four sites."""
        yield from (self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down)

    def __call__(self, x_TH: torch.Tensor, rotate: Rotation, batch: Batch) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        x_TH = x_TH + self.attention(self.attention_norm(x_TH), rotate, batch)
        return x_TH + self.mlp(self.mlp_norm(x_TH), batch)


class Decoder:
    """A model with uninitialised weights; `weights.placements` says what a checkpoint must put where."""

    def __init__(self, arch: Arch, weights: Weights) -> None:
        self.arch = arch
        self.weights = weights
        table = weights.tensor("model.embed_tokens.weight", arch.vocab_size, arch.hidden_size)
        self.embed = Embedding(table)
        self.layers = [Layer(arch, index, weights) for index in range(arch.num_layers)]
        self.norm = RMSNorm(weights.tensor("model.norm.weight", arch.hidden_size), arch.norm_eps)
        self.head = Head(table if arch.tie_embeddings else weights.tensor("lm_head.weight", *table.shape))
        self.rotary = Rotary(arch.rope, arch.head_dim, weights.device, weights.dtype)

    @property
    def sites(self) -> list[Site]:
        """What LoRA may touch, in the order of the forward."""
        return [linear.site for layer in self.layers for linear in layer.linears()]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on this rank."""
        return self.weights.bytes

    def attach(self, attention: AttentionBackend, pool: KvPool, lora: LoraBackend | None = None) -> None:
        """Gives every layer its backend, its cache and, where there is one, LoRA."""
        for index, layer in enumerate(self.layers):
            layer.attention.attach(attention, pool.layer(index))
            for linear in layer.linears():
                linear.lora = lora

    def forward(self, batch: Batch) -> torch.Tensor:
        """[T, H]: the normed hidden state of every token of the step; K and V are stored on the way."""
        rotate = self.rotary(batch.positions_T)
        x_TH = self.embed(batch.tokens_T)
        for layer in self.layers:
            x_TH = layer(x_TH, rotate, batch)
        return self.norm(x_TH)

    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """[S, V] float32 for the rows of `forward`'s answer that are asked for."""
        return self.head(hidden_SH)
