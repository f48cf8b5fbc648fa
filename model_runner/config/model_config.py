"""ModelConfig: the sizes and options of one decoder-only model. Does not depend on files or weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from model_runner.config.rope import Rope

DECODER = "model_runner.model.decoders.decoder:Decoder"


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP.

    layers       per layer: whether it has experts; the others have an MLP
    count        number of experts of a layer, of which a token uses `per_token`
    width        intermediate size of one expert
    renormalize  whether the chosen experts' weights sum to one
    block        the name of the experts' module below the layer in the checkpoint, for example "mlp"
    names        the names of gate, up and down of one expert in the checkpoint
    """

    layers: tuple[bool, ...]
    count: int
    per_token: int
    width: int
    renormalize: bool
    block: str
    names: tuple[str, str, str]


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and options of one decoder-only model.

    windows         per layer: how many positions a token attends to, itself included; None = all before it
    ropes           per layer: how positions rotate q and k; None = not at all
    max_length      the longest request that the model supports, with its rope scaling
    dtype           dtype of the weights in the checkpoint, which `--dtype auto` selects
    scale           factor on q k^T before the softmax; attention_cap is the softcap on the product
    norm            the kind of RMSNorm: plain, wide, or gemma (ops/base.py)
    qk_norm         whether q and k are normed before they are rotated
    activation      activation of the MLP's gate: silu or gelu_tanh
    fused           whether the checkpoint holds qkv_proj and gate_up_proj instead of their parts
    embed_scale     factor on embeddings; residual_scale on a layer's addends; logit_scale and logit_cap on logits
    decoder_class   the class that computes the model, "module:name"
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_length: int
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: torch.dtype
    scale: float
    attention_cap: float | None = None
    norm: Literal["plain", "wide", "gemma"] = "plain"
    qk_norm: bool = False
    activation: str = "silu"
    fused: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    experts: Experts | None = None
    decoder_class: str = DECODER

    @property
    def widest(self) -> int:
        """The most intermediate values of a token in an MLP or in all its experts; used to size memory."""
        if self.experts is None:
            return self.intermediate_size
        return max(self.intermediate_size, self.experts.per_token * (self.experts.width + self.hidden_size))

    def serving(self, length: int) -> ModelConfig:
        """Returns the config for a server whose longest request is `length` tokens: some ropes depend on `length`."""
        return replace(self, ropes=tuple(None if rope is None else rope.serving(length) for rope in self.ropes))
