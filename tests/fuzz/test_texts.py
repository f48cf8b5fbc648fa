"""Mutated tokenizer files, chat templates and checkpoints: each works, or raises ConfigError or InvalidRequest."""

# ruff: noqa: PT017 - a mutated case may be refused, or not

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from fixtures.adapters.mutations import Mutator
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import ConfigError, InvalidRequest
from engine.messages import ChatMessage
from model_runner.weights.checkpoint import SINGLE, Placement, load_checkpoint
from tokenizer_proc.text.templates.chat_template import ChatTemplate
from tokenizer_proc.text.tokenizer import Tokenizer

CASES = 10_000

# ------------------------------------------------------------------------------------------------- tokenizer files


def small(kind: str) -> dict[str, Any]:
    """Returns the tokenizer.json of a tokenizer of this kind with about a dozen tokens."""
    letters = ["a", "b", "c", "ab", "Ġ", "Ġa", "▁", "▁a", "<unk>", "<s>", "</s>", "<0x41>", "##b"]
    vocab = {token: number for number, token in enumerate(letters)}
    if kind == "bpe":
        made = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>", byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
        ])  # fmt: skip
    elif kind == "byte":
        made = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")]))
        split = pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+| ?\d{1,3}|\s+"), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
    elif kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram([(token, -1.0 * n) for n, token in enumerate(letters)], 8, True))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 9)])
    return json.loads(made.to_str())  # type: ignore[no-any-return]


TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "model_max_length": 512,
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
}


def test_mutated_tokenizer_files_load_or_are_refused(tmp_path: Path) -> None:
    mutator, loaded = Mutator(41), 0
    kinds = [small(kind) for kind in ("bpe", "byte", "unigram", "wordpiece")]
    for _ in range(CASES):
        which = mutator.draw.random()
        made, settings = mutator.draw.choice(kinds), TOKENIZER_CONFIG
        (tmp_path / "tokenizer.json").write_bytes(
            mutator.json(made) if which < 0.8 else json.dumps(made).encode("utf-8", "surrogatepass")
        )
        (tmp_path / "tokenizer_config.json").write_bytes(
            mutator.json(settings) if which > 0.6 else json.dumps(settings).encode()
        )
        try:
            tokenizer = Tokenizer.load(tmp_path)
            ChatTemplate.load(tmp_path, None, tokenizer.special_tokens)
        except ConfigError as error:
            assert str(tmp_path) in error.message or "template" in error.message
            continue
        loaded += 1
        try:
            ids = tokenizer.encode("ab a <s>c 日本 A")
        except InvalidRequest:
            continue
        assert isinstance(tokenizer.decode(ids), str)
        assert all(isinstance(tokenizer.token_bytes(token), bytes) for token in ids)
    assert CASES * 0.05 < loaded < CASES * 0.8, f"{loaded} were loaded: the cases are badly mixed"


def test_parts_that_refer_to_missing_tokens_fail_at_load(tmp_path: Path) -> None:
    """The tokenizers library panics when such a tokenizer is first used."""
    made = small("byte")
    made["post_processor"]["single"][0]["SpecialToken"]["id"] = "<nothing>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_character_unknown_to_the_tokenizer_is_refused(tmp_path: Path) -> None:
    made = small("wordpiece")
    del made["model"]["vocab"]["<unk>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(InvalidRequest, match="cannot read this text"):
        Tokenizer.load(tmp_path).encode("zzz")


def test_config_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(small("byte")))
    (tmp_path / "tokenizer_config.json").write_bytes(b'{"bos_token": "\xff"}')
    with pytest.raises(ConfigError, match="tokenizer_config"):
        Tokenizer.load(tmp_path)


# --------------------------------------------------------------------------------------------- templates, messages

TEMPLATE = (
    "{{- bos_token }}{% set ns = namespace(n=0) %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}"
    "{% endif %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% macro show(x) %}[{{ x | tojson }}]{% endmacro %}"
    "{{ '<|' + m.role + '|>' + m['content'] | upper + show(m.content) + '<|end|>' }}{% generation %}{{ m.name }}"
    "{% endgeneration %}{% if loop.last and tools is none %}{{ strftime_now('%Y') }}{% else %}{% continue %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{{ ns.n }}"
)
PIECES = re.findall(r"{%-?|-?%}|{{-?|-?}}|\w+|\s+|.", TEMPLATE)
ODD = [
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}", "{{ 'x' * 10000000000000 }}", "{{ range(10000000) | list }}", "{{ 1 / 0 }}",
    "{{ [].pop() }}", "{% include 'x' %}", "{% import 'os' as os %}", "{{ 10 ** 100000 }}", "{{ '%1000000000s' % 1 }}",
    "{{ messages | tojson(indent='x') }}", "{{ '{0.__class__}'.format(messages) }}", "{{ self }}", "{{ cycler }}",
    "{{ lipsum(n=3) }}", "{{ dict(a=1).x.y }}", "{{ m | attr('__init__') }}", "{{ strftime_now(1) }}",
    "{{ '\\ud800' }}", "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% block a %}{% endblock %}", "{{ '\\x00' | tojson }}", "{{ " + "-" * 3000 + "1 }}", "(" * 200,
    "{% set x = messages %}{{ x.sort() }}", "{{ namespace(**messages[0]).role }}",
    "{% if a %}" * 60 + "{% endif %}" * 60, "{% for i in messages %}" * 30 + "{% endfor %}" * 30,
    "{{ raise_exception(messages) }}", "{{ messages | sort(attribute='z') }}", "{{ 'a' | center(100) }}",
]  # fmt: skip
PAYLOADS = ["user", "system", "assistant", "tool", "", "日本", "{{ 7 * 7 }}", "\ud800", "</s>", "\x00", "x" * 200]


def template(mutator: Mutator) -> str:
    """Draws a template with pieces dropped, doubled or replaced, or with an odd piece inserted."""
    pieces = list(PIECES)
    for _ in range(mutator.draw.choice([1, 1, 1, 2, 5])):
        at = mutator.draw.randrange(len(pieces))
        what = mutator.draw.randrange(5)
        if what == 0:
            del pieces[at]
        elif what == 1:
            pieces.insert(at, mutator.draw.choice(pieces))
        elif what == 2:
            pieces[at] = mutator.draw.choice(pieces)
        elif what == 3:
            pieces[at] = mutator.text()[:300]
        else:
            pieces.insert(at, mutator.draw.choice(ODD))
    return "".join(pieces)


def messages(mutator: Mutator) -> list[ChatMessage]:
    """Draws a conversation, sometimes with odd roles and contents."""
    roles = ["user", "assistant"] * 2 if mutator.draw.random() < 0.7 else mutator.draw.choices(PAYLOADS, k=3)
    return [ChatMessage(role, mutator.draw.choice(PAYLOADS)) for role in roles[: mutator.draw.randrange(5)]]


def test_mutated_templates_render_or_are_refused() -> None:
    mutator, rendered = Mutator(42), 0
    for _ in range(CASES):
        try:
            chat = ChatTemplate(template(mutator), {"bos_token": "<s>"})
        except ConfigError:
            continue
        go_on = mutator.draw.random() < 0.2
        try:
            text = chat.render(messages(mutator), not go_on, go_on, tool=mutator.draw.choice([1, "x", None]))
        except InvalidRequest as error:
            assert error.param in ("messages", "continue_final_message")
            continue
        assert isinstance(text, str)
        assert "<class" not in text or "__class__" not in chat.source
        rendered += 1
    assert CASES * 0.1 < rendered < CASES * 0.9, f"{rendered} were rendered: the cases are badly mixed"


@pytest.mark.parametrize("odd", ODD)
def test_odd_template_renders_or_is_refused(odd: str) -> None:
    try:
        assert isinstance(ChatTemplate(odd).render([ChatMessage("user", "hi")]), str)
    except (ConfigError, InvalidRequest) as error:
        assert len(error.message) < 2000


# ----------------------------------------------------------------------------------------------------- checkpoints


def test_mutated_checkpoints_load_or_are_refused(tmp_path: Path) -> None:
    mutator, sound = Mutator(43), {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_file(sound, tmp_path / SINGLE)
    data, loaded = (tmp_path / SINGLE).read_bytes(), 0
    (length,) = struct.unpack("<Q", data[:8])
    fields, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(CASES):
        if mutator.draw.random() < 0.8:
            head = mutator.json(fields)
            mutated = struct.pack("<Q", len(head)) + head + body
        else:
            mutated = mutator.raw(data)
        (tmp_path / SINGLE).write_bytes(mutated)
        into = {name: torch.full_like(tensor, -7.0) for name, tensor in sound.items()}
        wanted = [
            Placement(name, into[name], tuple(tensor.shape), (slice(None),) * tensor.ndim)
            for name, tensor in sound.items()
        ]
        try:
            load_checkpoint(tmp_path, wanted)
        except ConfigError as error:
            assert str(tmp_path) in error.message
            continue
        loaded += 1
    assert CASES * 0.01 < loaded < CASES * 0.5, f"{loaded} were loaded: the cases are badly mixed"
