"""Adapters that bring tokens, a tokenizer and a chat template (some of them hostile), through the whole server."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import aiohttp
import peft
import pytest
import tokenizers
import torch
import transformers
from fixtures.models.tiny_models import VOCAB, build
from fixtures.serving.running import RunningServer

pytestmark = pytest.mark.e2e

ADDED = ["<|im_start|>", "<|im_end|>", "<|tool|>"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
NEW_TOKENS = 6


def trained(model_dir: Path, out: Path, size: int, seed: int) -> Any:
    """Saves an adapter with PEFT; if `size` is not VOCAB, with a resized vocabulary and trained embedding and head."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        if size != VOCAB:
            model.resize_token_embeddings(size)
        saved = ["embed_tokens", "lm_head"] if size != VOCAB else None
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, config)
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=draw)
                weight.copy_(weight + noise * (weight.std() if "modules_to_save" in name else 0.1))
        adapted.save_pretrained(str(out))
    return adapted.eval()


def with_tokenizer(model_dir: Path, root: Path) -> None:
    """Saves the base's tokenizer with three added tokens, another chat template and end token, as transformers does."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.add_special_tokens(ADDED)
    tokenizer.save(str(root / "tokenizer.json"))
    config = {"bos_token": ADDED[0], "eos_token": ADDED[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    (root / "chat_template.jinja").write_text(CHATML)


def greedy(model: Any, prompt: list[int], allowed: list[int] | None = None) -> list[int] | None:
    """Returns the greedy tokens among `allowed`, or None if the two best logits of a step are too close."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            choices = torch.tensor(allowed) if allowed else torch.arange(len(logits))
            best = logits[choices].topk(2)
            if float(best.values[0] - best.values[1]) < 1e-3:
                return None
            tokens.append(int(choices[best.indices[0]]))
    return tokens[len(prompt) :]


async def generate(
    session: aiohttp.ClientSession, prompt: list[int], lora: str | None, limits: dict[str, Any]
) -> list[int]:
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, **limits}
    body = {"input_ids": prompt, "lora_path": lora, "sampling_params": params}
    async with session.post("/generate", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    return list(answer["output_ids"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapter_with_tokens_tokenizer_and_template(tmp_path: Path) -> None:
    base = build("llama2", tmp_path / "model", seed=11)
    sizes = {"more": VOCAB + 3, "fewer": VOCAB - 4, "usual": VOCAB}
    models: dict[str | None, Any] = {None: transformers.AutoModelForCausalLM.from_pretrained(base)}
    for seed, (name, size) in enumerate(sizes.items()):
        models[name] = trained(base, tmp_path / name, size, seed)
    with_tokenizer(base, tmp_path / "more")
    for name, template in (("endless", ENDLESS), ("escape", "{{ ''.__class__.__mro__ }}")):
        shutil.copytree(tmp_path / "usual", tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    shutil.copytree(tmp_path / "usual", tmp_path / "broken")
    (tmp_path / "broken" / "chat_template.jinja").write_text("{% for")
    draw = random.Random(5)
    jobs: list[tuple[list[int], str | None, list[int], dict[str, Any]]] = []
    for name, model in models.items():
        answer = limited = None
        size = sizes[name] if name else VOCAB
        few = [size - 3, size - 2, 7, 9]
        while answer is None or limited is None:
            prompt = [size - 1, *(draw.randrange(size) for _ in range(draw.choice([2, 20])))]
            answer, limited = greedy(model, prompt), greedy(model, prompt, few)
        jobs.append((prompt, name, answer, {}))
        limits = {"allowed_token_ids": few} if name != "more" else {"allowed_token_ids": [*few, size - 1]}
        jobs.append((prompt, name, limited, limits | ({"bad_words": [ADDED[2]]} if name == "more" else {})))
    jobs += [(prompt, "also", answer, limits) for prompt, name, answer, limits in jobs if name == "more"]

    async def ask(url: str) -> None:
        async with aiohttp.ClientSession(url) as session:
            answers = await asyncio.gather(*(generate(session, prompt, name, own) for prompt, name, _, own in jobs * 2))
        for (_, name, expected, limits), tokens in zip(jobs * 2, answers, strict=True):
            assert tokens == expected, f"adapter {name}, {limits}"

    flags = ["--model-path", base, "--dtype", "float32", "--max-loras-per-batch", 3]
    with RunningServer(*flags, "--lora-paths", f"more={tmp_path / 'more'}", f"also={tmp_path / 'more'}") as server:
        for name in ("fewer", "usual", "endless", "escape"):
            status, said = server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(tmp_path / name)})
            assert status == 200, said
        status, said = server.post("/load_lora_adapter", {"lora_name": "b", "lora_path": str(tmp_path / "broken")})
        assert status == 400
        assert "not valid jinja" in str(said)
        asyncio.run(ask(server.url))
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        for name in ("endless", "escape"):
            status, said = server.post("/v1/chat/completions", chat | {"model": name})
            assert status == 400, said
            assert server.post("/v1/completions", {"prompt": "hi", "model": name, "max_tokens": 2})[0] == 200
        status, said = server.post("/v1/chat/completions", chat | {"model": "more"})
        assert status == 200, said
        assert server.post("/tokenize", {"model": "more", "messages": chat["messages"]})[1]["tokens"][0] == VOCAB
        assert server.post("/detokenize", {"model": "more", "tokens": [VOCAB + 1]})[1]["text"] == "<|im_end|>"
        assert server.post("/detokenize", {"tokens": [VOCAB + 1]})[0] == 400
        for name, size in [(None, VOCAB), ("fewer", VOCAB - 4), ("more", VOCAB + 3)]:
            status, said = server.post("/generate", {"input_ids": [size], "lora_path": name})
            assert status == 400
            assert f"vocabulary of {size} tokens" in str(said)
        cards = {card["id"]: card for card in server.get("/v1/models")["data"]}
        for name in ("more", "also"):
            own = cards[name]["vocab_size"], cards[name]["brings"]
            assert own == (VOCAB + 3, ["tokenizer", "chat_template", "generation"])
        assert (cards["usual"]["vocab_size"], cards["usual"]["brings"]) == (VOCAB, [])
        for name in ("more", "also", "fewer", "usual", "endless", "escape"):
            assert server.post("/unload_lora_adapter", {"lora_name": name})[0] == 200
        server.wait_idle()
    with RunningServer(*flags, "--enable-lora", "--lora-extra-vocab-size", 2) as server:
        status, said = server.post("/load_lora_adapter", {"lora_name": "m", "lora_path": str(tmp_path / "more")})
        assert status == 400
        assert "3 more than the model's" in str(said)
        assert "--lora-extra-vocab-size" in str(said)
