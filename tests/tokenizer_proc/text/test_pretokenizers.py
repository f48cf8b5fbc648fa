"""The published expressions are those of transformers, letter by letter, and the tokenizers library takes each."""

from __future__ import annotations

import inspect

import pytest
import tokenizers
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers.convert_slow_tokenizer import TikTokenConverter

from tokenizer_proc.text.pretokenizers import KNOWN, PUBLISHED

TEXT = "It's 12345 naïve   words,\r\n\tтекст 漢字 かな \U0001f600!!  \n\n end"


@pytest.mark.parametrize("name", PUBLISHED)
def test_expression_is_taken_by_the_library(name: str) -> None:
    split = Split(tokenizers.Regex(PUBLISHED[name]), behavior="isolated")
    assert "".join(piece for piece, _ in split.pre_tokenize_str(TEXT)) == TEXT


def test_expressions_of_transformers_are_known() -> None:
    import transformers.models.qwen2.tokenization_qwen2 as qwen2
    import transformers.models.qwen3_5.tokenization_qwen3_5 as qwen3_5

    assert PUBLISHED["Qwen 2, 2.5, 3"] == qwen2.PRETOKENIZE_REGEX
    assert PUBLISHED["Qwen 3.5"] == qwen3_5.PRETOKENIZE_REGEX
    assert inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default in KNOWN
    corrected = inspect.getsource(transformers.tokenization_utils_tokenizers)
    assert PUBLISHED["Mistral's tekken, also as transformers corrects it"] in corrected


def test_expression_of_gpt2_splits_as_the_library_does() -> None:
    own = Split(tokenizers.Regex(PUBLISHED["GPT-2"]), behavior="isolated").pre_tokenize_str(TEXT)
    theirs = ByteLevel(add_prefix_space=False).pre_tokenize_str(TEXT)
    assert [span for _, span in own] == [span for _, span in theirs]
