"""The regular expressions that published tokenizers split text with. They are known to end, so adapters may bring them.

An expression is known by its exact text. Gemma's tokenizers have none.
"""

from __future__ import annotations

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_GPT2_TAIL = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PUBLISHED = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d|" + _GPT2_TAIL,
    "GPT-2 of tiktoken": r"'(?:[sdmt]|ll|ve|re)|" + _GPT2_TAIL,
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "Llama 3, GLM 4, SmolLM 3, OLMo 2": rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}",
    "Qwen 2, 2.5, 3": rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}|{_MARKS}|{_SPACES}",
    "Qwen 3.5": (rf"{_CONTRACTIONS}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"),
    "Mistral's tekken, also as transformers corrects it": (
        rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    ),
    "o200k": (
        rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    ),
    "DeepSeek 3": (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ).replace(r"\"", '"'),
    "three digits": r"\p{N}{1,3}",
    "one digit": r"\p{N}",
    "digits": r"\p{N}+",
    "CJK": "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "CJK of DeepSeek": "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    "line ends": r"[\r\n]",
    "words": r"\s?\p{L}+",
    "punctuation": r"\s?\p{P}+",
    "runs of spaces": " {2,}",
    "white space": r"\s+",
}
"""The expressions by the models that have them."""

KNOWN = frozenset(PUBLISHED.values())
