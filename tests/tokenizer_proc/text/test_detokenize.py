"""Increments joined together equal the text decoded at once, for random ids, also with broken UTF-8."""

from __future__ import annotations

import pytest
from fixtures.models import small_tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenizer_proc.text.detokenize import Detokenizer
from tokenizer_proc.text.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(small_tokenizers.byte_level())
LLAMA = Tokenizer(small_tokenizers.sentencepiece())
UNIGRAM = Tokenizer(small_tokenizers.sentencepiece(unigram=True))
WORDS = Tokenizer(small_tokenizers.word_piece())
KINDS = {"byte level": BYTE_LEVEL, "llama": LLAMA, "unigram": UNIGRAM, "word piece": WORDS}

TEXT = st.text(alphabet="abc é ß 漢字 🙂 \n,.", max_size=30)
CUTS = st.lists(st.integers(1, 4), max_size=40)


def run(tokenizer: Tokenizer, prompt: list[int], ids: list[int], cuts: list[int], skip: bool) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    text, at = "", 0
    for cut in [*cuts, *[1] * len(ids)]:
        text += detokenizer.push(ids[at : at + cut])
        at += cut
    return text + detokenizer.flush()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", ["byte level", "word piece"])
def test_random_ids_decode_to_the_same_text_in_increments(kind: str, skip: bool) -> None:
    tokenizer = KINDS[kind]

    @given(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40), CUTS)
    def check(ids: list[int], cuts: list[int]) -> None:
        assert run(tokenizer, [0], ids, cuts, skip) == whole(tokenizer, [0], ids, skip)

    check()


def whole(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> str:
    before = tokenizer.decode(prompt, skip)
    after = tokenizer.decode(prompt + ids, skip)
    assert after.startswith(before)
    return after[len(before) :]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_random_ids_without_broken_byte_runs_decode_the_same(kind: str, skip: bool) -> None:
    """With byte fallback: random ids whose runs of byte tokens are valid UTF-8."""
    tokenizer = KINDS[kind]
    byte = {b: tokenizer.backend.token_to_id(f"<0x{b:02X}>") for b in range(256)}
    plain = [i for i in range(tokenizer.vocab_size) if i not in set(byte.values())]
    piece = st.sampled_from(plain).map(lambda i: [i]) | st.sampled_from("é漢🙂 \n").map(
        lambda c: [byte[b] for b in c.encode()]
    )

    @given(st.lists(piece, max_size=20), CUTS, st.sampled_from([[plain[-5]], [tokenizer.bos_id or plain[-4]]]))
    def check(pieces: list[list[int]], cuts: list[int], prompt: list[int]) -> None:
        ids = [i for p in pieces for i in p]
        assert run(tokenizer, prompt, ids, cuts, skip) == whole(tokenizer, prompt, ids, skip)

    check()


@given(st.lists(st.integers(0, 255), max_size=30), CUTS)
def test_broken_byte_fallback_becomes_replacement_characters(octets: list[int], cuts: list[int]) -> None:
    ids = [LLAMA.backend.token_to_id(f"<0x{octet:02X}>") for octet in octets]
    a = LLAMA.backend.token_to_id("a")
    assert run(LLAMA, [a], ids, cuts, True) == bytes(octets).decode("utf-8", "replace")
    broken = b"\xff" + bytes(octets)
    assume(broken.decode("utf-8", "replace").count("\ufffd") == len(broken))  # the library agrees only then
    ids = [LLAMA.backend.token_to_id(f"<0x{octet:02X}>") for octet in broken]
    assert run(LLAMA, [a], ids, cuts, True) == whole(LLAMA, [a], ids, True)


@pytest.mark.parametrize("kind", ["byte level", "llama", "unigram"])
def test_text_survives_a_round_trip_through_any_tokenizer(kind: str) -> None:
    tokenizer = KINDS[kind]

    @given(TEXT, CUTS)
    def check(text: str, cuts: list[int]) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert run(tokenizer, [], ids, cuts, True) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("kind", ["byte level", "llama", "unigram"])
def test_no_increment_ends_inside_a_character(kind: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode("x 🙂 漢字 é", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, [1])
    pieces = [detokenizer.push([token]) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "🙂" in pieces
    assert detokenizer.flush() == ""


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    first = BYTE_LEVEL.encode("🙂", add_special_tokens=False)[0]
    detokenizer = Detokenizer(BYTE_LEVEL, [5])
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_leading_space_is_kept_only_after_a_prompt() -> None:
    for tokenizer in (LLAMA, UNIGRAM):
        ids = tokenizer.encode("hello", add_special_tokens=False)
        assert tokenizer.backend.id_to_token(ids[0]).startswith("▁")
        assert run(tokenizer, tokenizer.encode("The world"), ids, [], True) == " hello"
        assert run(tokenizer, [tokenizer.backend.token_to_id("<s>")], ids, [], True) == "hello"
        assert run(tokenizer, [], ids, [], True) == "hello"
