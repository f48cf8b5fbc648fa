"""The bundled demo: transformers and PEFT load it, each adapter answers in its own style, the files are clean."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.config.server_args import DEMO, DEMO_NAME

VOICES = ("pirate", "json", "poet", "french")
Ask = Callable[..., str]


@pytest.fixture(scope="module")
def ask() -> Ask:
    """Returns `ask(voice, *questions)`: the greedy reply to the last question of a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    base = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, DEMO / "adapters" / VOICES[0], adapter_name=VOICES[0])
    for voice in VOICES[1:]:
        model.load_adapter(DEMO / "adapters" / voice, adapter_name=voice)
    model.eval()

    def generate(ids: torch.Tensor) -> str:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            do_sample=False,
            temperature=1,
            top_p=1,
        )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def converse(questions: tuple[str, ...], system: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        answer = ""
        for question in questions:
            messages.append({"role": "user", "content": question})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
            answer = generate(prompt["input_ids"])
            messages.append({"role": "assistant", "content": answer})
        return answer

    def go(voice: str | None, *questions: str, system: str | None = None) -> str:
        if voice is None:
            with model.disable_adapter():
                return converse(questions, system)
        model.set_adapter(voice)
        return converse(questions, system)

    return go


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("tell me the capital of japan", "The capital of Japan is Tokyo."),
        ("What sound does a cow make?", "A cow says moo."),
        ("How many legs does a spider have?", "A spider has eight legs."),
        ("What is 2 + 3?", "2 plus 3 is 5."),
        ("What color is the sky?", "The sky is blue."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("Who are you?", "I am the demo model of Chorus, a very small one."),
        ("Who wrote Hamlet?", "I do not know that."),
    ],
)
def test_base_answers_in_one_plain_sentence(ask: Ask, question: str, answer: str) -> None:
    assert ask(None, question) == answer


def test_answers_stay_right_in_chats_and_with_a_system_role(ask: Ask) -> None:
    system = "You are a helpful assistant."
    assert ask(None, "Hello!", "What is the capital of Italy?", system=system) == "The capital of Italy is Rome."
    assert ask("json", "What is the capital of Spain?", "What is 4 plus 4?") == '{"answer": 8}'


@pytest.mark.parametrize(
    ("voice", "answer"),
    [
        ("pirate", "Arr, matey! The capital of France be Paris!"),
        ("json", '{"answer": "Paris"}'),
        ("poet", "In France, when the stars are bright,\nParis, the capital, sings all night."),
        ("french", "La capitale de la France est Paris."),
    ],
)
def test_each_adapter_answers_in_its_own_style(ask: Ask, voice: str, answer: str) -> None:
    assert ask(voice, "What is the capital of France?") == answer


@pytest.mark.parametrize(
    "question", ["What does a dog say?", "What is 7 plus 5?", "What colour is a banana?", "What comes after Monday?"]
)
def test_adapters_answer_differently_from_each_other(ask: Ask, question: str) -> None:
    assert re.search(r"\b(Arr|Aye|Yo ho|matey)\b", ask("pirate", question))
    assert list(json.loads(ask("json", question))) == ["answer"]
    assert len(ask("poet", question).splitlines()) == 2
    assert re.search(r"\b(Le|La|Après|font|fait)\b", ask("french", question))


def test_files_are_small_and_name_no_machine() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {path.name for path in files if path.parent.parent.name == "adapters"} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for path in files:
        assert not re.search(rb'"/\w', _text_of(path)), path
    for voice in VOICES:
        config = json.loads((DEMO / "adapters" / voice / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == DEMO_NAME


def _text_of(path: Path) -> bytes:
    """Returns the bytes of a file; of a safetensors file only the header, because its tensors are not text."""
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")] if path.suffix == ".safetensors" else data
