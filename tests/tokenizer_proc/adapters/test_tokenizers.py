"""Adapters' own tokenizers, templates and end ids: shared if they are equal, bounded, and never run as code."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
from fixtures.models import small_tokenizers
from fixtures.serving.tokenizer_front import ENDPOINTS, TEMPLATE, Fake, capacity, config

from engine.config.process_configs import AdapterSource
from engine.errors import AdapterError, InvalidRequest
from engine.messages import AdapterState, ChatMessage, Generate, SamplingParams, Submit
from tokenizer_proc.adapters import tokenizers as library_module
from tokenizer_proc.adapters.tokenizers import TextTools, TokenizerLibrary
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.text.generation_config import GenerationConfig
from tokenizer_proc.text.pretokenizers import PUBLISHED
from tokenizer_proc.text.templates.chat_template import ChatTemplate
from tokenizer_proc.text.templates.sandbox import SandboxedTemplate
from tokenizer_proc.text.tokenizer import Tokenizer

OWN = "{% for m in messages %}<|end|>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return small_tokenizers.save(small_tokenizers.byte_level(), tmp_path / "base")


@pytest.fixture
def library(base: Path) -> Iterator[TokenizerLibrary]:
    made = started(base)
    yield made
    made.close()


def started(base: Path, **options: Any) -> TokenizerLibrary:
    tokenizer = Tokenizer.load(base)
    defaults = GenerationConfig(end_ids=[tokenizer.backend.token_to_id("</s>"), 7], temperature=0.5)
    return TokenizerLibrary(TextTools(tokenizer, ChatTemplate(TEMPLATE), defaults), base, **options)


def adapter(base: Path, name: str, *, extra: str = "", template: str | None = None, eos: str = "</s>") -> Path:
    """Writes a directory with the base's tokenizer, and optionally another token, template or end id."""
    root = base.parent / name
    shutil.copytree(base, root)
    if extra:
        tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
        tokenizer.add_special_tokens([extra])
        tokenizer.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": eos}))
    if template is not None:
        (root / "chat_template.jinja").write_text(template)
    return root


def test_equal_files_have_one_revision_in_every_process(base: Path, library: TokenizerLibrary) -> None:
    roots = {
        "base": adapter(base, "base2"),
        "token": adapter(base, "token", extra="<x>"),
        "other token": adapter(base, "token2", extra="<y>"),
        "template": adapter(base, "template", template=OWN),
        "other template": adapter(base, "template2", template=OWN + " "),
        "end": adapter(base, "end", eos="<|end|>"),
    }
    found = {name: library.load(name, root).revision for name, root in roots.items()}
    assert found["base"] == ""
    assert len(set(found.values())) == len(roots)
    successor = started(base)
    assert {name: successor.load(name, root).revision for name, root in reversed(roots.items())} == found
    successor.close()


def test_an_adapter_that_brings_nothing_new_uses_the_base(base: Path, library: TokenizerLibrary) -> None:
    (base.parent / "bare").mkdir()
    assert library.load("bare", base.parent / "bare") is library.base
    assert library.load("gone", base.parent / "gone") is library.base
    assert library.load("copy", adapter(base, "copy")) is library.base
    spelt = adapter(base, "spelt")
    saved = json.loads((spelt / "tokenizer.json").read_text())
    padding = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None}
    saved["padding"] = padding | {"pad_id": 1, "pad_type_id": 0, "pad_token": "</s>"}
    (spelt / "tokenizer.json").write_text(json.dumps(saved, indent=3))
    (spelt / "chat_template.jinja").write_text(TEMPLATE)
    assert library.load("spelt", spelt) is library.base


def test_an_adapter_brings_tokens_end_ids_and_template(base: Path, library: TokenizerLibrary) -> None:
    own = library.load("a", adapter(base, "a", extra="<|im_end|>", template=OWN, eos="<|im_end|>"))
    token = library.base.tokenizer.vocab_size
    assert own.tokenizer.encode("x<|im_end|>", add_special_tokens=False)[-1] == token == own.tokenizer.eos_id
    assert own.tokenizer.decode([token], skip_special_tokens=False) == "<|im_end|>"
    assert own.generation_config.end_ids == [*library.base.generation_config.end_ids, token]
    assert own.generation_config.temperature == 0.5
    assert own.brings == ("tokenizer", "chat_template", "generation")
    assert isinstance(own.chat, SandboxedTemplate)
    assert asyncio.run(own.chat.prompt([ChatMessage("user", "hi")])) == "<|end|>hi<|im_end|>"
    (base.parent / "a" / "generation_config.json").write_text('{"temperature": 1.0, "eos_token_id": [3]}')
    assert library.load("a", base.parent / "a").generation_config == GenerationConfig(
        end_ids=[*library.base.generation_config.end_ids, 3, token], temperature=1.0
    )


def test_an_end_id_of_another_token_is_dropped(base: Path, library: TokenizerLibrary) -> None:
    root = base.parent / "other"
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    made.decoder = tokenizers.decoders.ByteLevel()
    small_tokenizers.save(made, root)
    assert library.load("other", root).generation_config.end_ids == [2]


def test_equal_tools_are_kept_once_and_freed(base: Path, library: TokenizerLibrary) -> None:
    one = library.load("a", adapter(base, "a", extra="<x>", template=OWN))
    two = library.load("b", adapter(base, "b", extra="<x>", template=OWN))
    assert one is two
    other = library.load("c", adapter(base, "c", extra="<x>"))
    assert other is not one
    assert other.tokenizer.origin is one.tokenizer.origin
    held = weakref.ref(one.tokenizer.origin)
    del one, two, other
    gc.collect()
    assert held() is None


def test_an_operators_template_is_used_for_all_adapters(base: Path) -> None:
    library = started(base, fixed_template=True)
    assert library.load("a", adapter(base, "a", template=OWN)) is library.base
    library.close()


TRICKY = ["hello<x>  world", "<s>déjà<plain><|user|> x", "a b", "<x><x>", " <|end|> 日本"]


def test_added_tokens_share_the_model_of_the_base(
    base: Path, library: TokenizerLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = adapter(base, "a")
    made = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    made.add_special_tokens(["<x>"])
    made.add_tokens([tokenizers.AddedToken(" wor", single_word=True, lstrip=True, normalized=False)])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <x>", special_tokens=[("<x>", made.token_to_id("<x>"))]
    )
    made.save(str(root / "tokenizer.json"))
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "parse", None)  # the file is not parsed
        own = library.load("a", root).tokenizer
    whole = Tokenizer.load(root)
    for text in TRICKY:
        ids = whole.encode(text)
        assert own.encode(text) == ids
        assert own.encode(text, add_special_tokens=False) == whole.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert own.decode(ids, skip) == whole.decode(ids, skip)
        assert [own.token_bytes(token) for token in ids] == [whole.token_bytes(token) for token in ids]
    for field in ("special_ids", "vocab_size", "longest_token", "bos_id", "eos_id", "special_tokens"):
        assert getattr(own, field) == getattr(whole, field), field
    assert library.base.tokenizer.encode("<x>") != own.encode("<x>")


def test_an_added_token_with_another_id_is_parsed_in_full(base: Path, library: TokenizerLibrary) -> None:
    root = adapter(base, "a", extra="<x>")
    saved = json.loads((root / "tokenizer.json").read_text())
    saved["added_tokens"][-1]["id"] += 5
    (root / "tokenizer.json").write_text(json.dumps(saved))
    own, whole = library.load("a", root).tokenizer, Tokenizer.load(root)
    assert own.encode("a<x>") == whole.encode("a<x>")


def reformatted(root: Path) -> None:
    """Writes the tokenizer.json of `root` with the same content, but other bytes."""
    saved = json.loads((root / "tokenizer.json").read_text())
    (root / "tokenizer.json").write_text(json.dumps(saved, indent=3))


def other_model(root: Path) -> Tokenizer:
    """Gives `root` a tokenizer with another model than the base's."""
    small_tokenizers.save(small_tokenizers.byte_level(300), root)
    return Tokenizer.load(root)


def test_an_equal_model_is_never_parsed_in_this_process(
    base: Path, library: TokenizerLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    same, more = adapter(base, "same"), adapter(base, "more", extra="<x>")
    whole = Tokenizer.load(more)
    for root in (same, more):
        reformatted(root)
    monkeypatch.setattr(Tokenizer, "parse", None)
    assert library.load("same", same).tokenizer is library.base.tokenizer
    assert library.load("more", more).tokenizer.encode("a<x>") == whole.encode("a<x>")


def test_a_large_other_model_is_parsed_at_the_start_only(
    base: Path, library: TokenizerLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = base.parent / "other"
    whole = other_model(root)
    assert library.load("small", root).tokenizer.encode("hello") == whole.encode("hello")
    gc.collect()
    monkeypatch.setattr(library_module, "MOST_OWN_MODEL", 2000)
    with pytest.raises(AdapterError, match=r"adapter `other`: .*another model .*give this adapter with --lora-paths"):
        library.load("other", root)
    source = AdapterSource(adapter_id=1, name="other", path="other", root=str(root))
    found = library.load_all([source])
    assert found[1].tokenizer.encode("hello") == whole.encode("hello")


def test_too_many_added_tokens_are_refused(
    base: Path, library: TokenizerLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "MOST_ADDED", 1)
    assert library.load("one", adapter(base, "one", extra="<x>")).brings
    two = adapter(base, "two", extra="<x>")
    made = tokenizers.Tokenizer.from_file(str(two / "tokenizer.json"))
    made.add_tokens(["<y>"])
    made.save(str(two / "tokenizer.json"))
    with pytest.raises(AdapterError, match="adds at most 1"):
        library.load("two", two)


def test_a_tokenizer_much_larger_than_the_bases_is_refused(
    base: Path, library: TokenizerLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = adapter(base, "large")
    monkeypatch.setattr(library_module, "LEAST_BOUND", 0)
    raw = (root / "tokenizer.json").read_bytes()
    (root / "tokenizer.json").write_bytes(raw + b" " * 3 * len(raw))
    assert library.load("large", root) is library.base
    (root / "tokenizer.json").write_bytes(raw + b" " * (3 * len(raw) + 1))
    with pytest.raises(AdapterError, match="more than"):
        library.load("large", root)


def test_many_different_tokenizers_are_bounded(
    base: Path, library: TokenizerLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "MOST_TOKENIZERS", 2)
    kept = [library.load(name, adapter(base, name, extra=f"<{name}>")) for name in "ab"]
    root = adapter(base, "c", extra="<c>")
    with pytest.raises(AdapterError, match=r"adapter `c`: 2 different tokenizers of adapters are loaded"):
        library.load("c", root)
    assert library.load("again", adapter(base, "again", extra="<a>")) is kept[0]
    del kept
    gc.collect()
    assert library.load("c", root) is not library.base


def test_published_expression_is_accepted(base: Path, library: TokenizerLibrary) -> None:
    root = adapter(base, "a", extra="<x>")
    spoil_pattern(root, PUBLISHED["Llama 3, GLM 4, SmolLM 3, OLMo 2"])
    assert library.load("a", root).tokenizer.encode("a<x>") == Tokenizer.load(root).encode("a<x>")


def spoil_pattern(root: Path, expression: str = "(a+)+$") -> None:
    saved = json.loads((root / "tokenizer.json").read_text())
    saved["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
            saved["pre_tokenizer"],
        ],
    }
    (root / "tokenizer.json").write_text(json.dumps(saved))


def pipe(root: Path) -> None:
    (root / "tokenizer.json").unlink()
    os.mkfifo(root / "tokenizer.json")


def refer_to_nothing(root: Path) -> None:
    saved = json.loads((root / "tokenizer.json").read_text())
    saved["post_processor"]["single"][0]["SpecialToken"]["id"] = "<nothing>"
    (root / "tokenizer.json").write_text(json.dumps(saved))


SPOILT = {
    "a reference": (refer_to_nothing, "cannot be read"),
    "a pattern": (spoil_pattern, "regular expression that neither the model's tokenizer"),
    "no json": (lambda root: (root / "tokenizer.json").write_bytes(b"\xff{"), "cannot be read"),
    "a part": (lambda root: (root / "tokenizer.json").write_text("{}"), "cannot be read"),
    "a pipe": (pipe, "no regular file"),
    "a config": (lambda root: (root / "tokenizer_config.json").write_text('{"eos_token": 5}'), "cannot be read"),
    "a template": (lambda root: (root / "chat_template.jinja").write_text("{% for"), "not valid jinja"),
    "an endless one": (
        lambda root: (root / "chat_template.jinja").write_text("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"),
        "template",
    ),
    "half a letter": (lambda root: (root / "chat_template.jinja").write_bytes(b"\xc3"), "cannot be read"),
    "too long": (lambda root: (root / "chat_template.jinja").write_bytes(b"a" * (2 << 20)), "more than 1 MiB"),
}


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_files_outside_of_the_roots_are_refused(name: str, base: Path, library: TokenizerLibrary) -> None:
    root, outside = adapter(base, "root/a", extra="<x>", template=OWN), adapter(base, "outside", template=OWN)
    (root / "generation_config.json").write_text("{}")
    (outside / "generation_config.json").write_text('{"temperature": 0.25}')
    assert library.load("a", root, [str(root.parent)]).brings
    (root / name).unlink()
    (root / name).symlink_to(outside / name)
    with pytest.raises(AdapterError, match=f"adapter `a`: .*{name}: lies outside of --lora-root"):
        library.load("a", root, [str(root.parent)])
    assert library.load("a", root)
    with pytest.raises(AdapterError, match=r"adapter `a`: .*outside: lies outside"):
        library.load("a", outside, [str(root.parent)])


def test_start_up_adapters_are_read_under_their_roots(base: Path, library: TokenizerLibrary) -> None:
    root, outside = adapter(base, "root/a", template=OWN), adapter(base, "outside", template=OWN)
    sources = [
        AdapterSource(adapter_id=number, name=path.name, path="p", root=str(path), roots=[str(root.parent)])
        for number, path in enumerate((root, outside), start=1)
    ]
    failed: dict[int, str] = {}
    assert library.load_all(sources, failed).keys() == {1}
    assert "adapter `outside`" in failed[2]
    with pytest.raises(AdapterError, match=r"adapter `outside`: .* lies outside of --lora-root"):
        library.load_all(sources)


@pytest.mark.parametrize("name", SPOILT)
def test_unreadable_files_are_refused(name: str, base: Path, library: TokenizerLibrary) -> None:
    spoil, said = SPOILT[name]
    root = adapter(base, "a", template=OWN)
    spoil(root)  # type: ignore[operator]
    with pytest.raises(AdapterError, match=said) as caught:
        library.load("a", root)
    assert "adapter `a`" in caught.value.message
    assert library.load("b", adapter(base, "b", template=OWN)) is not library.base


# ------------------------------------------------------------------------------------------------- through the front


def front(base: Path, **directories: Path) -> Fake:
    """Returns a front end whose adapters are in these directories; its tokenizer is the base's."""
    fake = Fake(*directories)
    for name, root in directories.items():
        entry = fake.front.adapters.find(name)
        assert entry is not None
        entry.text_tools = fake.front.tokenizer_library.load(name, root)
    return fake


def ask(fake: Fake, lora: str | dict[str, float] | None, prompt: Any = "x<x>", **params: Any) -> Generate:
    """Returns the Generate message that the scheduler receives."""

    async def work() -> Generate:
        sampling = SamplingParams(max_tokens=4, **params)
        async with fake.front.open(Submit(id=1, prompt=prompt, lora=lora, params=sampling)):
            return fake.generates[-1]

    return asyncio.run(work())


def test_each_adapter_uses_its_own_text_tools(base: Path) -> None:
    fake = front(base, a=adapter(base, "a", extra="<x>", template=OWN, eos="<x>"), b=adapter(base, "b"))
    size = fake.front.tokenizer.vocab_size
    fake.front.handle(AdapterState(adapter_id=1, state="host", revision="r", vocab_size=size + 1))
    assert ask(fake, "a").prompt[-1] == size
    assert size not in ask(fake, "b").prompt
    assert size not in ask(fake, None).prompt
    assert size in ask(fake, "a").stopping.end_ids
    assert ask(fake, "b").stopping == ask(fake, None).stopping
    chat = [ChatMessage("user", "hi")]
    assert ask(fake, "a", chat).prompt[-1] == size
    assert ask(fake, "b", chat).prompt == ask(fake, None, chat).prompt
    card = fake.front.adapters.card("a")
    assert card is not None
    assert (card.vocab_size, card.brings) == (size + 1, ["tokenizer", "chat_template", "generation"])
    fake.front.tokenizer_library.close()


def test_ids_are_checked_by_the_adapters_own_vocabulary(base: Path) -> None:
    fake = front(base, large=adapter(base, "a"), small=adapter(base, "b"), usual=adapter(base, "c"))
    size = fake.front.tokenizer.vocab_size
    for number, vocab in enumerate((size + 3, size - 5, 0), start=1):
        fake.front.handle(AdapterState(adapter_id=number, state="host", revision="r", vocab_size=vocab))
    assert ask(fake, "large", [size + 2], top_k=size + 9).sampling.top_k == size + 3
    assert ask(fake, "large", [5], logit_bias={size + 2: 1.0}, stop_token_ids=[size]).stopping.end_ids[-1] == size
    for lora, vocab in (("large", size + 3), ("small", size - 5), ("usual", size), (None, size)):
        whose = f" of adapter `{lora}`" if lora in ("large", "small") else "$"
        assert ask(fake, lora, [vocab - 1]).prompt == [vocab - 1]
        for refused in ({"prompt": [vocab]}, {"stop_token_ids": [vocab]}, {"logit_bias": {vocab: 1.0}}):
            said = f"token id {vocab} is not in the vocabulary of {vocab} tokens{whose}"
            with pytest.raises(InvalidRequest, match=said):
                ask(fake, lora, **{"prompt": [5], **refused})
    for mix in ({"large": 0.5}, {"large": 1.0, "usual": 1.0}, {"small": 1.0, "large": 1.0}):
        with pytest.raises(InvalidRequest, match="has a vocabulary of its own: it can neither be mixed nor scaled"):
            ask(fake, mix)
    assert ask(fake, {"large": 1.0}, [size]).lora == [(1, 1.0)]


def test_a_mix_uses_its_adapters_tools_where_they_agree(base: Path) -> None:
    own = {name: adapter(base, name, extra="<x>") for name in ("a", "b")}
    fake = front(base, **own, c=adapter(base, "c"))
    fake.front.handle(capacity(fake.front.tokenizer.vocab_size + 1))
    size = fake.front.tokenizer.vocab_size
    assert ask(fake, {"a": 0.5, "b": 0.5}).prompt[-1] == size
    assert size not in ask(fake, {"a": 0.5, "c": 0.5}).prompt


def test_a_name_re_pointed_while_a_text_is_encoded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = front(base, a=adapter(base, "a"))
    fake.front.handle(capacity(fake.front.tokenizer.vocab_size + 1))
    newer = fake.front.tokenizer_library.load("a", adapter(base, "newer", extra="<x>"))
    directory = fake.front.adapters

    async def slow(tenant: str, tokenizer: Tokenizer, text: str, special: bool, *_: Any) -> list[int]:
        if tokenizer is not old_tokenizer:
            return tokenizer.encode(text, special)
        entry = directory.add("a", "newer", "newer", pinned=False, preload=False, text_tools=newer)
        entry.update(AdapterState(adapter_id=entry.source.adapter_id, state="host", revision="n"))
        directory.point(entry)
        return tokenizer.encode(text, special)

    old = directory.find("a")
    assert old is not None
    assert old.text_tools is not None
    old_tokenizer = old.text_tools.tokenizer
    monkeypatch.setattr(fake.front.texts, "encode", slow)
    generate = ask(fake, "a")
    assert generate.lora[0][0] > 1
    assert generate.prompt[-1] == fake.front.tokenizer.vocab_size


def test_start_up_adapters_tools_are_read_at_the_start(base: Path) -> None:
    good, broken = adapter(base, "good", extra="<x>"), adapter(base, "broken", template="{% for")
    sources = [
        AdapterSource(adapter_id=number, name=root.name, path=root.name, root=str(root))
        for number, root in enumerate((good, broken), start=1)
    ]

    def front_of(epoch: int) -> Frontend:
        settings = msgspec.structs.replace(
            config(), adapters=sources, endpoints=msgspec.structs.replace(ENDPOINTS, epoch=epoch)
        )
        tokenizer = Tokenizer.load(base)
        return Frontend(settings, lambda _: None, tokenizer, ChatTemplate(TEMPLATE), GenerationConfig())

    with pytest.raises(AdapterError, match="adapter `broken`: the chat template is not valid jinja"):
        front_of(epoch=0)
    taken_over = front_of(epoch=1)
    assert taken_over.adapters.stages() == {"good": "loading", "broken": "failed"}
    (reason,) = taken_over.adapters.accept_failed()
    assert "adapter `broken`: the chat template is not valid jinja" in reason
    assert taken_over.text_tools_for("good").tokenizer.vocab_size == taken_over.tokenizer.vocab_size + 1
    taken_over.tokenizer_library.close()
