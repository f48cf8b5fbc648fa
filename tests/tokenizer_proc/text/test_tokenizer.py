"""Loading, encoding, and the exact bytes of tokens, compared with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from fixtures.models import small_tokenizers
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError, InvalidRequest
from tokenizer_proc.text.tokenizer import Tokenizer, TooManyTokens


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizers.save(small_tokenizers.byte_level(), tmp_path_factory.mktemp("tokenizer"))


def test_the_tokenizer_agrees_with_transformers(directory: Path) -> None:
    ours = Tokenizer.load(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)

    @given(st.text(max_size=40))
    def check(text: str) -> None:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                kept = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip_special_tokens=skip) == kept

    check()
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert set(theirs.all_special_ids) <= ours.special_ids


@pytest.mark.parametrize(
    "backend",
    [small_tokenizers.byte_level(), small_tokenizers.sentencepiece(), small_tokenizers.sentencepiece(unigram=True)],
    ids=["byte level", "llama", "unigram"],
)
def test_token_bytes_together_are_the_text(backend: object) -> None:
    tokenizer = Tokenizer(backend)  # type: ignore[arg-type]

    @given(st.text(alphabet="abc é漢🙂\n", max_size=30))
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(tokenizer.token_bytes(each) for each in ids).decode()
        decoded = tokenizer.decode(ids)
        assert joined in (decoded, " " + decoded)  # sentencepiece adds a space, which its decoder removes

    check()


def test_parts_of_characters_have_their_exact_bytes() -> None:
    for tokenizer in (Tokenizer(small_tokenizers.byte_level()), Tokenizer(small_tokenizers.sentencepiece())):
        ids = tokenizer.encode("🙂", add_special_tokens=False)
        octets = [byte for each in ids for byte in tokenizer.token_bytes(each)]
        assert bytes(octets).decode().strip() == "🙂"
        assert "\ufffd" in tokenizer.token_text(ids[-1])
        assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


def test_too_many_tokens_are_refused_before_a_list_is_made(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("hello world")
    assert tokenizer.encode("hello world", most=len(ids)) == ids
    with pytest.raises(TooManyTokens) as raised:
        tokenizer.encode("hello world", most=len(ids) - 1)
    assert raised.value.count == len(ids)


def test_a_lone_surrogate_is_refused(directory: Path) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        Tokenizer.load(directory).encode("a\ud800b")


def test_a_directory_without_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json.*--tokenizer-path"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_truncation_in_the_file_is_ignored(tmp_path: Path) -> None:
    backend = small_tokenizers.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.load(small_tokenizers.save(backend, tmp_path))
    assert 4 < len(tokenizer.encode("the quick brown fox jumps over it")) < 64
