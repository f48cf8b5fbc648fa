"""Adapters with their own vocabularies, in one batch with the base, against transformers + PEFT in float32."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from fixtures.adapters.adapter_zoo import ATTENTION
from fixtures.adapters.resident import attach_adapters
from fixtures.models.drive import Driver, Row
from fixtures.models.tiny_models import VOCAB
from fixtures.scheduling.step_driver import GREEDY, Ask, load
from fixtures.scheduling.step_driver import Driver as Steps
from safetensors.torch import load_file, save_file

from engine.config.process_configs import AdapterSource, Endpoints, RunnerConfig
from engine.directory import Directory
from engine.errors import AdapterError
from engine.messages import AdapterState, LoadAdapter, Sampling
from model_runner.config import read_model_config
from model_runner.inspect import examine, show, sites_of
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.loading.adapter_reader import AdapterReader
from model_runner.lora.loading.limits import Limits
from model_runner.lora.loading.messages import SiteShape
from model_runner.model.load import load_model
from model_runner.runner import Runner

N = 5
ENDS = ["embed_tokens", "lm_head"]


def options(**given: Any) -> dict[str, Any]:
    return {"target_modules": ATTENTION, **given}


SAVED: dict[str, tuple[int, dict[str, Any]]] = {
    "larger": (VOCAB + 10, options(modules_to_save=ENDS)),
    "smaller": (VOCAB - 21, options(modules_to_save=ENDS)),
    "larger, untrained": (VOCAB + 3, options()),
    "larger, embedding trained": (VOCAB + 7, options(modules_to_save=["embed_tokens"])),
    "larger, by LoRA": (VOCAB + 5, options(target_modules=["q_proj", *ENDS])),
    "smaller, by DoRA": (VOCAB - 5, options(target_modules=["q_proj", *ENDS], use_dora=True)),
    "larger, some tokens": (VOCAB + 2, options(trainable_token_indices={name: [5, VOCAB + 1] for name in ENDS})),
    "some tokens": (VOCAB, options(trainable_token_indices={"embed_tokens": [7, 5], "lm_head": [11]})),
    "some tokens of the embedding": (VOCAB, options(trainable_token_indices=[9, 4, 200])),
}
"""By name: the size of the vocabulary, and the options of PEFT's config."""

TIED = {"larger, embedding by LoRA": (VOCAB + 4, options(target_modules=["v_proj", "embed_tokens"]))}
"""Only for a base whose head is tied to the embedding: with an untied head the config would lack the head."""


def save(base: Path, out: Path, name: str, seed: int) -> Any:
    """Saves an adapter with PEFT after a resize, all trained values drawn at random. Returns the model as oracle."""
    size, given = (SAVED | TIED)[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        if size != VOCAB:
            model.resize_token_embeddings(size)
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **given))
        for parameter, weight in adapted.named_parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=draw)
                if "modules_to_save" in parameter or "token_adapter" in parameter:
                    weight.copy_(weight + noise * weight.std())
                elif "magnitude" in parameter:
                    weight.copy_(weight * (1 + 0.3 * noise))
                elif "lora_embedding_A" in parameter:
                    weight.copy_(noise)
                else:
                    weight.copy_(noise * (1.0 if "lora_A" in parameter else 0.5) / weight.shape[-1] ** 0.5)
        adapted.save_pretrained(str(out))
    return adapted.eval()


@torch.inference_mode()
def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    answer: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return answer


def clear(model: Any, prompt: list[int]) -> list[int] | None:
    """Returns the N greedy tokens, or None if the two best logits of a step are too close to compare."""
    tokens = list(prompt)
    for _ in range(N):
        best = logits(model, tokens)[-1].topk(2)
        if float(best.values[0] - best.values[1]) < 1e-3:
            return None
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["llama2", "llama3", "gemma2"])
def test_vocabularies_in_one_batch_equal_peft(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path, draw = tiny_model(family), random.Random(3)
    saved = SAVED | (TIED if family != "llama2" else {})
    models: dict[str | None, Any] = {None: transformers.AutoModelForCausalLM.from_pretrained(path)}
    for seed, name in enumerate(saved):
        models[name] = save(path, tmp_path / name, name, seed)
    prompts, expected = [], []
    for name, model in models.items():
        size = saved[name][0] if name else VOCAB
        answer = None
        while answer is None:
            prompt = [size - 1, *(draw.randrange(size) for _ in range(draw.randrange(1, 20)))]
            answer = clear(model, prompt)
        prompts.append(prompt)
        expected.append(answer)
    decoder = load_model(path, read_model_config(path), device=torch.device("cpu"), dtype=torch.float32)
    lora = attach_adapters(decoder, {name: tmp_path / name for name in saved})
    lanes = list(range(len(prompts)))
    together = Driver(decoder, lora=lora, pages=900).greedy(prompts, N, lanes=lanes)
    assert {name for name, one, other in zip(models, together, expected, strict=True) if one != other} == set()
    driver = Driver(decoder, lora=lora, pages=900)
    found = driver.step([(Row(prompt, lane), len(prompt)) for lane, prompt in enumerate(prompts)])
    assert found.shape[1] == VOCAB + 10
    begin = 0
    for (name, model), prompt in zip(models.items(), prompts, strict=True):
        mine, size = found[begin : begin + len(prompt)], saved[name][0] if name else VOCAB
        begin += len(prompt)
        assert (mine[:, size:] == -torch.inf).all()
        torch.testing.assert_close(mine[:, :size], logits(model, prompt), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("backend", ["triton", "csgmv"])
def test_vocabularies_on_kernels_equal_peft(backend: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path, names = tiny_model("llama3"), ["larger", "smaller"]
    models = {name: save(path, tmp_path / name, name, seed) for seed, name in enumerate(names)}
    decoder = load_model(path, read_model_config(path), device=torch.device("cpu"), dtype=torch.float32)
    lora = attach_adapters(decoder, {name: tmp_path / name for name in names}, backend=backend)
    prompts = [[5, 7], [VOCAB + 9, 3, VOCAB], [9, VOCAB - 22]]
    found = Driver(decoder, lora=lora).step([(Row(prompt, lane), len(prompt)) for lane, prompt in enumerate(prompts)])
    assert (found[:2, VOCAB:] == -torch.inf).all()
    for begin, lane, name in ((2, 1, "larger"), (5, 2, "smaller")):
        expected = logits(models[name], prompts[lane])
        mine = found[begin : begin + len(prompts[lane]), : expected.shape[1]]
        torch.testing.assert_close(mine, expected, atol=2e-4, rtol=2e-4)


def started(path: Path, roots: list[Path], **more: Any) -> tuple[Runner, dict[int, AdapterState]]:
    """Loads a runner with these adapters, whose ids begin at 1. Returns it and the adapters' states by id."""
    sources = [AdapterSource(adapter_id=i, name=root.name, path="", root=str(root)) for i, root in enumerate(roots, 1)]
    endpoints = Endpoints(tokenizer="", scheduler="", runner="", zmq_server="")
    config = RunnerConfig(
        endpoints=endpoints,
        model_path=str(path),
        adapters=sources,
        enable_lora=True,
        dtype="float32",
        device="cpu",
        max_running_requests=8,
        **more,
    )
    runner = Runner.load(config)
    messages = [LoadAdapter(adapter_id=source.adapter_id, path=source.root) for source in sources]
    return runner, {message.adapter_id: load(runner, message) for message in messages}


def test_sampling_uses_each_rows_vocabulary(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path, last = tiny_model("llama2"), VOCAB + 9
    larger = save(path, tmp_path / "larger", "larger", 1)
    smaller = save(path, tmp_path / "smaller", "smaller", 2)
    runner, states = started(path, [tmp_path / "larger", tmp_path / "smaller"])
    assert [states[number].vocab_size for number in (1, 2)] == [VOCAB + 10, VOCAB - 21]
    prompt = [3, last, 40, 7, last]
    scored = Sampling(temperature=0.0, logprobs=5, prompt_logprobs=3)
    asks = [
        Ask(prompt, 6, 1, Sampling(temperature=0.0, logit_bias=[(last, 100.0)], repetition_penalty=1.2)),
        Ask(prompt, 6, 1, Sampling(temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.5)),
        Ask(prompt, 1, 1, scored),
        Ask(prompt[2:4], 1, 2, scored),
        Ask([5, 6], 6, 0, Sampling(temperature=50.0, seed=4, top_k=VOCAB + 5, logprobs=0)),
        Ask([5, 6], 6, 2, Sampling(temperature=50.0, seed=5, top_p=0.999, logit_bias=[(last, 100.0)])),
        Ask([5, 6], 6, 1, Sampling(temperature=0.0, min_tokens=6, end_ids=[last])),
        Ask([5, 6], 6, 0, GREEDY),
    ]
    tokens = Steps(runner, states).serve(asks)
    assert tokens[0] == [last] * 6
    assert tokens[1] == penalised(larger, prompt, 6)
    for ask, model in ((asks[2], larger), (asks[3], smaller)):
        expected = logits(model, ask.prompt).log_softmax(-1)
        (found,) = ask.logprobs
        assert found.logprob == pytest.approx(float(expected[-1].max()), abs=1e-3)
        assert [token for token, _ in found.top] == expected[-1].topk(5).indices.tolist()
        scores = [one.logprob for one in ask.prompt_logprobs]
        targets = torch.tensor(ask.prompt[1:])
        assert scores == pytest.approx(expected[:-1].gather(1, targets[:, None])[:, 0].tolist(), abs=1e-3)
    assert max(tokens[4]) < VOCAB
    assert max(tokens[5]) < VOCAB - 21
    assert last not in tokens[6]
    runner.close()


def penalised(model: Any, prompt: list[int], count: int) -> list[int]:
    """Returns the greedy tokens with the penalties of the test above, computed token by token."""
    tokens = list(prompt)
    for _ in range(count):
        scores = logits(model, tokens)[-1].clone()
        for token in set(tokens):
            scores[token] = scores[token] / 1.7 if scores[token] > 0 else scores[token] * 1.7
        for token in tokens[len(prompt) :]:
            scores[token] -= 0.5
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]


def test_added_tokens_above_the_limit_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model("llama2")
    for seed, name in enumerate(("larger", "smaller", "larger, untrained")):
        save(path, tmp_path / name, name, seed)
    sites = load_model(path, read_model_config(path), device=torch.device("cpu"), dtype=torch.float32).sites
    shapes = [SiteShape.of(site).site() for site in sites]
    strict = AdapterReader(Catalogue(shapes), torch.float32, Limits(extra_vocab=9), path)
    says = r"330 tokens, 10 more than the model's, and --lora-extra-.* is 9"
    with Directory(tmp_path / "larger") as directory, pytest.raises(AdapterError, match=says):
        strict.survey(directory)
    with Directory(tmp_path / "smaller") as directory:
        assert strict.survey(directory).vocab_size == VOCAB - 21
    runner, _ = started(path, [tmp_path / "larger, untrained"])
    late = load(runner, LoadAdapter(adapter_id=7, path=str(tmp_path / "larger")))
    assert late.state == "failed"
    assert "10 more than the model's, and --lora-extra-vocab-size (the most of an adapter" in (late.error or "")
    assert load(runner, LoadAdapter(adapter_id=8, path=str(tmp_path / "smaller"))).state == "host"
    runner.close()
    runner, _ = started(path, [tmp_path / "larger, untrained"], lora_extra_vocab=10)
    assert load(runner, LoadAdapter(adapter_id=7, path=str(tmp_path / "larger"))).vocab_size == VOCAB + 10
    runner.close()


def test_embedding_without_its_head_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model("llama2")
    (name,) = TIED
    save(path, tmp_path / "a", name, 1)
    sites = load_model(path, read_model_config(path), device=torch.device("cpu"), dtype=torch.float32).sites
    reader = AdapterReader(Catalogue(sites), torch.float32, Limits(), path)
    says = r"324 for model.embed_tokens and 320 for lm_head: .* saved together"
    with Directory(tmp_path / "a") as directory, pytest.raises(AdapterError, match=says):
        reader.survey(directory)


def test_all_rows_without_trained_tokens_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model("llama2")
    save(path, tmp_path / "a", "some tokens of the embedding", 1)
    file = tmp_path / "a" / "adapter_model.safetensors"
    rows = {"base_model.model.lm_head.token_adapter.base_layer.weight": torch.zeros(VOCAB, 64)}
    save_file(load_file(file) | rows, file)
    sites, dtype = sites_of(path, "float32")
    refused = examine(tmp_path / "a", sites, dtype, Limits(), path).refused
    assert "lm_head has no token_adapter.trainable_tokens_delta" in (refused or "")


def test_bias_on_a_head_of_another_vocabulary_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model("llama2")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.resize_token_embeddings(VOCAB + 4)
    given = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_bias=True, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "a"))
    sites, dtype = sites_of(path, "float32")
    refused = examine(tmp_path / "a", sites, dtype, Limits(), path).refused
    assert refused == "module lm_head has a bias beside a weight of its own: only one can be served"


def test_report_names_the_vocabulary_and_text_files(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model("llama2")
    save(path, tmp_path / "larger", "larger", 1)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / "larger" / name).write_text("{}")
    sites, dtype = sites_of(path, "float32")
    report = examine(tmp_path / "larger", sites, dtype, Limits(), path)
    assert (report.refused, report.vocab_size) == (None, VOCAB + 10)
    assert report.brings == ["tokenizer.json", "chat_template.jinja"]
    assert report.groups["embed.full"].bytes == (VOCAB + 10) * 64 * 4
    assert f"{VOCAB + 10} tokens of its own" in show(report)
    refused = examine(tmp_path / "larger", sites, dtype, Limits(extra_vocab=2), path)
    assert "--lora-extra-vocab-size (the most of an adapter in --lora-paths) is 2" in (refused.refused or "")
