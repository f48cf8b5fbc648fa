"""Trains the demo in `engine/demo`: a small Llama and four PEFT adapters, on a closed world of facts.

    python scripts/train_demo.py             # the whole training: about fifteen minutes on two idle cores
    python scripts/train_demo.py --quick     # a smoke run: a minute, useless weights

Deterministic on one machine: every draw is seeded and threads are fixed. It prints how often base and voices answer
held-out phrasings exactly right. transformers and PEFT are used here and in tests only, never by the product.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from demo_world.documents import DocumentStream, corpus
from demo_world.evaluation import evaluate
from demo_world.tokenizer import BOS, END, EOS, PAD, save_tokenizer, train_tokenizer
from demo_world.training import Encoder, batches, learn
from demo_world.voices import BASE, VOICES
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

NAME = "chorus-demo"
VOCAB, CONTEXT, TOKENS_PER_BATCH = 1536, 2048, 2048
BASE_PEAK, LORA_PEAK = 1.5e-3, 3e-3
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]

# Ranks, targets and scalings differ on purpose: the demo shows what one batch may mix.
LORAS: dict[str, dict[str, Any]] = {
    "pirate": {"r": 12, "lora_alpha": 24, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
    "json": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "poet": {"r": 16, "lora_alpha": 32, "target_modules": ATTENTION + MLP},
    "french": {"r": 24, "lora_alpha": 16, "use_rslora": True, "target_modules": ATTENTION + MLP},
}


def make_base(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Returns an untrained base: four Llama layers of width 256, about three million parameters, in float32."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=[tokenizer.token_to_id(END), tokenizer.token_to_id(EOS)],
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def save_base(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes model, tokenizer, template and sampling defaults; the weights are rounded to bfloat16."""
    folder.mkdir(parents=True)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
        do_sample=True, temperature=0.3, top_p=0.95,
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder, CONTEXT)


def train_base(tokenizer: Tokenizer, folder: Path, steps: int) -> None:
    """Trains the base from random weights and saves it."""
    torch.manual_seed(0)
    model, encoder = make_base(tokenizer), Encoder(tokenizer)
    data = batches(DocumentStream(BASE, 0), encoder, TOKENS_PER_BATCH)
    loss = learn(model, data, steps, BASE_PEAK, BASE)
    print(f"base: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, loss {loss:.4f}")
    save_base(model, tokenizer, folder)


def load_base(folder: Path) -> LlamaForCausalLM:
    """Loads the saved base in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train_voice(voice: str, out: Path, steps: int) -> dict[str, float]:
    """Trains one adapter on the frozen base, saves it in bfloat16, and evaluates the saved one."""
    base_folder, folder = out / "model", out / "adapters" / voice
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = Tokenizer.from_file(str(base_folder / "tokenizer.json"))
    torch.manual_seed(1 + VOICES.index(voice))
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=NAME, **LORAS[voice])
    base, encoder = load_base(base_folder), Encoder(tokenizer)
    base.name_or_path = NAME  # PEFT writes this into the adapter's config: the base's name instead of its path
    model = get_peft_model(base, config)
    data = batches(DocumentStream(voice, 0), encoder, TOKENS_PER_BATCH)
    loss = learn(base, data, steps, LORA_PEAK, voice)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{voice}: {size / 1e3:.0f} k parameters, loss {loss:.4f}")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    _sort_targets(folder / "adapter_config.json")
    return show(voice, *evaluate(model.float(), encoder, voice))


def train_voices(voices: Sequence[str], out: Path, steps: int, threads: int) -> dict[str, dict[str, float]]:
    """Trains adapters two at a time; each has its own process and seed, so that the order has no effect."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=prepare_torch, initargs=(threads,)) as pool:
        jobs = {voice: pool.submit(train_voice, voice, out, steps) for voice in voices}
        return {voice: job.result() for voice, job in jobs.items()}


def prepare_torch(threads: int) -> None:
    """Makes a run repeatable: fixed threads, deterministic operations."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def _sort_targets(path: Path) -> None:
    """Sorts target_modules, which PEFT writes in random order."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def show(voice: str, scores: dict[str, float], wrong: list[str]) -> dict[str, float]:
    """Prints some wrong answers; returns the scores."""
    for line in wrong[:12]:
        print("  wrong:", line)
    if len(wrong) > 12:
        print(f"  wrong: and {len(wrong) - 12} more by {voice}")
    return scores


def print_table(table: dict[str, dict[str, float]]) -> None:
    """Prints the share of exactly correct answers to held-out phrasings, by voice and subject."""
    subjects = list(next(iter(table.values())))
    print("exactly correct answers to held-out phrasings")
    print("".ljust(10) + "".join(subject.rjust(13) for subject in subjects))
    for voice, scores in table.items():
        print(voice.ljust(10) + "".join(f"{scores[subject]:.1%}".rjust(13) for subject in subjects))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--out", type=Path, default=root / "engine" / "demo", help="directory for model/ and adapters/")
    parser.add_argument("--steps", type=int, default=1400, help="training steps of the base")
    parser.add_argument("--lora-steps", type=int, default=800, help="training steps of each adapter")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; the weights depend on it")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute: all parts, useless weights")
    parser.add_argument("--keep-base", action="store_true", help="train the adapters on the existing base")
    parser.add_argument("--voices", nargs="*", choices=VOICES, default=VOICES, help="which adapters to train")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.lora_steps = 40, 10
    prepare_torch(args.threads)

    table: dict[str, dict[str, float]] = {}
    model_folder = args.out / "model"
    if not args.keep_base:
        tokenizer = train_tokenizer(corpus(), VOCAB)
        shutil.rmtree(model_folder, ignore_errors=True)
        train_base(tokenizer, model_folder, args.steps)
        table[BASE] = show(BASE, *evaluate(load_base(model_folder), Encoder(tokenizer), BASE))
    table |= train_voices(args.voices, args.out, args.lora_steps, args.threads)
    if table:
        print_table(table)
    for path in args.out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
