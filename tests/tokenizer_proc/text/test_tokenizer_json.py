"""A tokenizer that shares another one's model equals the one that is parsed from the whole file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from fixtures.models import small_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer_proc.text.tokenizer import Tokenizer
from tokenizer_proc.text.tokenizer_json import TokenizerSections

KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": small_tokenizers.byte_level,
    "sentencepiece": small_tokenizers.sentencepiece,
    "unigram": lambda: small_tokenizers.sentencepiece(unigram=True),
    "word piece": small_tokenizers.word_piece,
}
ADDED = ["<x>", " y", "hello"]


def pair(kind: str) -> tuple[Tokenizer, Tokenizer]:
    """Returns two tokenizers with added tokens: (made around the base's model, parsed in full)."""
    base = Tokenizer(KINDS[kind]())
    more = tokenizers.Tokenizer.from_str(base.backend.to_str())
    more.add_special_tokens([ADDED[0]])
    more.add_tokens([tokenizers.AddedToken(ADDED[1], lstrip=True), tokenizers.AddedToken(ADDED[2], single_word=True)])
    raw = more.to_str().encode()
    made = TokenizerSections.read(raw).over(base)
    assert made is not None
    return made, Tokenizer.parse(raw, Path("tokenizer.json"), {})


PAIRS = {kind: pair(kind) for kind in KINDS}
PIECES = st.sampled_from([*ADDED, "<s>", "<|user|>", "</s>", " ", "hello world", "é", "日", "a", "\n", "x<y", "yy"])


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(PIECES | st.text(max_size=4), max_size=12), special=st.booleans())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_shared_model_encodes_and_decodes_the_same(kind: str, parts: list[str], special: bool) -> None:
    made, whole = PAIRS[kind]
    text = "".join(parts).encode("utf-8", "ignore").decode()
    ids = whole.encode(text, special)
    assert made.encode(text, special) == ids
    assert made.decode(ids, special) == whole.decode(ids, special)
    assert [made.token_bytes(token) for token in ids] == [whole.token_bytes(token) for token in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_model_has_the_same_attributes(kind: str) -> None:
    made, whole = PAIRS[kind]
    assert (made.special_ids, made.vocab_size) == (whole.special_ids, whole.vocab_size)
    assert made.longest_token >= whole.longest_token


def test_patterns_are_found_at_any_depth() -> None:
    split = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": "b+"}, "content": ""}
    sections = TokenizerSections(pre_tokenizer={"type": "Sequence", "pretokenizers": [split]}, decoder=replace)
    assert sections.patterns == {"a+", "b+"}
