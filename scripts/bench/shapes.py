"""Models and adapters of real shapes with random weights, written straight to disk. Nothing is trained or downloaded.

Writes file formats; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCAB = 32000


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama: layers, hidden, FFN, query heads, key/value heads. Each head has 64 dimensions."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns the (in, out) sizes of each linear of a layer, by its name in the checkpoint."""
        kv = self.kv_heads * 64
        return {
            "self_attn.q_proj": (self.hidden, self.heads * 64),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (self.heads * 64, self.hidden),
            "mlp.gate_proj": (self.hidden, self.ffn),
            "mlp.up_proj": (self.hidden, self.ffn),
            "mlp.down_proj": (self.ffn, self.hidden),
        }

    def weight_bytes(self) -> int:
        """Returns the bytes of the base in bfloat16 that a decode step reads: all linears and the head."""
        return 2 * (self.layers * sum(i * o for i, o in self.linears().values()) + VOCAB * self.hidden)

    def lora_bytes(self, rank: int) -> int:
        """Returns the bytes in bfloat16 that a decode step reads of one adapter on all linears."""
        return 2 * rank * self.layers * sum(i + o for i, o in self.linears().values())


SHAPES = {
    "tiny": Shape(2, 128, 256, 2, 1),
    "0.5b": Shape(24, 896, 4864, 14, 2),
    "1b": Shape(16, 2048, 8192, 32, 8),
}


def make_model(shape: Shape, directory: Path, seed: int = 0) -> Path:
    """Writes a bfloat16 model with a tokenizer of 32,000 entries, unless it exists; returns its directory."""
    if (directory / "tokenizer.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": _noise(draw, VOCAB, shape.hidden)}
    tensors["lm_head.weight"] = _noise(draw, VOCAB, shape.hidden)
    tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for layer in range(shape.layers):
        for name, (inner, outer) in shape.linears().items():
            tensors[f"model.layers.{layer}.{name}.weight"] = _noise(draw, outer, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2))
    _make_tokenizer(directory)
    return directory


def make_adapter(
    shape: Shape, directory: Path, rank: int, seed: int = 0, modules: Sequence[str] = (), *, dora: bool = False
) -> Path:
    """Writes a PEFT LoRA or DoRA in bfloat16 on all linears, or on those whose last name is in `modules`.

    An existing adapter is kept. Returns its directory.
    """
    if (directory / "adapter_model.safetensors").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    chosen = {name: size for name, size in shape.linears().items() if not modules or name.split(".")[-1] in modules}
    tensors = {}
    for layer in range(shape.layers):
        for name, (inner, outer) in chosen.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = _noise(draw, rank, inner)
            tensors[f"{path}.lora_B.weight"] = _noise(draw, outer, rank)
            if dora:  # magnitudes of about the norm of the base's weight rows
                tensors[f"{path}.lora_magnitude_vector"] = torch.rand(outer, generator=draw).to(torch.bfloat16) + 0.5
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "use_dora": dora,
        "target_modules": [name.split(".")[-1] for name in chosen],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def _noise(draw: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=draw) / columns**0.5).to(torch.bfloat16)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _make_tokenizer(directory: Path) -> None:
    """Writes a byte-level tokenizer without merges: 256 bytes, and unused words up to the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet, start=2)}
    vocab |= {f"w{number}": number for number in range(len(alphabet) + 2, VOCAB)}
    vocab |= {"<s>": 0, "</s>": 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
