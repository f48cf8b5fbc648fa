"""Tests the effect of every flag, as a client sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.models.tiny_models import make_adapter
from fixtures.serving.running import RunningServer

pytestmark = pytest.mark.e2e

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }} indeed{% endfor %}"


@pytest.fixture(scope="module")
def adapter(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(
        tiny_model("llama3"), tmp_path_factory.mktemp("adapter") / "a", r=6, targets=["q_proj", "v_proj"]
    )


def test_launch_with_every_flag(tiny_model: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    pinned = json.dumps({"lora_name": "kept", "lora_path": str(adapter), "pinned": True})
    named = json.dumps({"name": "child", "path": str(adapter), "base_model_name": "one"})
    flags = ["--model", tiny_model("llama3"), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "bfloat16"]
    flags += ["--enable-lora", "--lora-paths", f"a={adapter}", pinned, "--lora-modules", named, adapter]
    flags += ["--max-loras", 3, "--max-lora-rank", 20, "--lora-target-modules", "q_proj", "v_proj", "o_proj"]
    flags += ["--lora-backend", "torch", "--lora-dtype", "float32", "--chunked-prefill-size", 40]
    flags += ["--no-enable-prefix-caching", "--block-size", 8, "--max-total-tokens", 2000]
    flags += ["--max-num-seqs", 5, "--gpu-memory-utilization", 0.3, "--max-model-len", 200, "--seed", 9]
    flags += ["--served-model-name", "one", "two", "--chat-template", template, "--log-level", "debug", "--tp-size", 1]
    with RunningServer(*flags) as server:
        capacity = server.get("/server_info")["capacity"]
        assert capacity["dtype"] == "bfloat16"
        assert capacity["device"] == "cpu"
        assert capacity["max_loras"] == 3
        assert capacity["max_lora_rank"] == 20
        pages = {"qkv": 6, "o": 6}  # three adapters of rank 20 in pages of 16; DoRA gains, biases and norms have slots
        assert capacity["rank_pages"] == {**pages, "qkv.vectors": 3, "o.vectors": 3, "norms.full": 3}
        assert set(capacity["lora_targets"]) == {"q_proj", "v_proj", "o_proj"}
        assert capacity["max_batched_tokens"] == 40
        assert capacity["rows"] == 5
        assert capacity["max_length"] == 200
        assert (capacity["page_size"], capacity["kv_pages"]) == (8, 250)
        assert "bfloat16" in server.banner
        assert " D " in server.log()  # lines at debug level

        cards = {card["id"]: card for card in server.get("/v1/models")["data"]}
        assert set(cards) == {"one", "two", "a", "kept", "child", str(adapter)}
        assert cards["kept"]["pinned"]
        assert not cards["a"]["pinned"]
        assert cards["child"]["parent"] == "one"
        assert cards["a"]["lora_rank"] == 6

        ids = server.post("/tokenize", {"messages": [{"role": "user", "content": "so"}]})[1]["tokens"]
        assert server.post("/detokenize", {"tokens": ids})[1]["prompt"].endswith("so indeed")
        long = {"input_ids": [9] * 150, "lora_path": "a", "sampling_params": {"max_new_tokens": 3}}
        for _ in range(2):
            status, answer = server.post("/generate", long)
            assert status == 200  # although the prompt is longer than a step
            assert answer["meta_info"]["cached_tokens"] == 0
        status, answer = server.post("/generate", {"input_ids": [9] * 201})
        assert status == 400
        assert "200" in answer["error"]["message"]


def test_adapter_of_another_base_is_a_warning(tiny_model: Callable[[str], Path], adapter: Path) -> None:
    named = json.dumps({"name": "child", "path": str(adapter), "base_model_name": "other"})
    with RunningServer("--model", tiny_model("llama3"), "--lora-modules", named) as server:
        assert "child names other as its base model" in server.log()
        assert server.get("/v1/models/child")["parent"] == "other"


def test_seed_flag_makes_unseeded_requests_repeatable(tiny_model: Callable[[str], Path]) -> None:
    def texts(*flags: object) -> list[str]:
        body = {"prompt": "once upon", "max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
        with RunningServer("--model-path", tiny_model("llama3"), *flags) as server:
            return [server.post("/v1/completions", body)[1]["choices"][0]["text"] for _ in range(3)]

    first = texts("--seed", 5)
    assert first == texts("--random-seed", 5)
    assert first != texts("--seed", 6)


def test_no_enable_lora_serves_no_adapters(tiny_model: Callable[[str], Path]) -> None:
    with RunningServer("--model-path", tiny_model("llama3"), "--no-enable-lora") as server:
        assert "LoRA      off" in server.banner
        assert server.get("/server_info")["capacity"]["max_loras"] == 0
        status, answer = server.post("/generate", {"text": "x", "lora_path": "a"})
        assert status == 404
        assert "LoRA" in answer["error"]["message"] or "does not exist" in answer["error"]["message"]


GROUPS = ("qkv", "o", "gate_up", "down")


def test_enable_lora_alone_allocates_rank_64_on_all_sites(tiny_model: Callable[[str], Path]) -> None:
    with RunningServer("--model-path", tiny_model("llama3"), "--enable-lora", "--max-loras", 2) as server:
        capacity = server.get("/server_info")["capacity"]
        assert capacity["max_lora_rank"] == 64
        pages, slots = dict.fromkeys(GROUPS, 8), {f"{group}.vectors": 2 for group in GROUPS} | {"norms.full": 2}
        assert capacity["rank_pages"] == {**pages, **slots}
        assert "rank up to 64" in server.banner


def test_tokenizer_path_replaces_the_models_tokenizer(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, texts = tmp_path / "model", tmp_path / "texts"
    shutil.copytree(tiny_model("llama3"), model)
    texts.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).rename(texts / name)
    (texts / "chat_template.jinja").write_text(TEMPLATE)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "eos_token_id": 7}))
    (texts / "generation_config.json").write_text("no JSON")
    with RunningServer("--model", model, "--tokenizer-path", texts, "--device", "cpu") as server:
        ids = server.post("/tokenize", {"messages": [{"role": "user", "content": "so"}]})[1]["tokens"]
        assert server.post("/detokenize", {"tokens": ids})[1]["prompt"].endswith("so indeed")
        body = {"model": str(model), "prompt": "so", "max_tokens": 2}
        assert server.post("/v1/completions", body)[0] == 200
        assert server.get("/server_info")["tokenizer_path"] == str(texts)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("empty", "it has no tokenizer.json"),
        ("file", "is a file"),
        ("no/such/place", "neither a directory nor a hub id"),
    ],
)
def test_bad_tokenizer_path_is_a_one_line_error(
    source: str, words: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "engine.launch", tiny_model("llama3"), "--tokenizer-path", tmp_path / source]
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"chorus: --tokenizer-path: {tmp_path / source}")
    assert words in line
