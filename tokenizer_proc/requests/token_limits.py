"""Validation of the parameters that limit which tokens are sampled: `allowed_token_ids` and `bad_words`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from engine.errors import InvalidRequest
from engine.messages import SamplingParams
from tokenizer_proc.text.tokenizer import Tokenizer

MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 256
MAX_BAD_WORD_TOKENS = 64
MAX_CHARACTERS = 8192  # of all words together; encoding them takes some milliseconds, during which the event loop waits


def encode_bad_words(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the token ids of each word as it stands at the beginning of a text, and after a space.

    Raises InvalidRequest for an empty word, and for too many or too long ones.
    """
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(
            f"bad_words has {len(words)} entries; at most {MAX_BAD_WORDS} are taken", param="bad_words"
        )
    size = sum(map(len, words))
    if size > MAX_CHARACTERS:
        raise InvalidRequest(
            f"bad_words have {size} characters together; at most {MAX_CHARACTERS} are taken", param="bad_words"
        )
    found = dict[tuple[int, ...], None]()
    for place, word in enumerate(words):
        if not word.strip() or len(word) > MAX_BAD_WORD_CHARACTERS:
            raise InvalidRequest(
                f"bad_words[{place}]: a bad word has 1 to {MAX_BAD_WORD_CHARACTERS} characters, not only spaces",
                param=f"bad_words[{place}]",
            )
        for text in (word, " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) > MAX_BAD_WORD_TOKENS:
                raise InvalidRequest(
                    f"bad_words[{place}] has {len(ids)} tokens; at most {MAX_BAD_WORD_TOKENS} are taken",
                    param=f"bad_words[{place}]",
                )
            if ids:
                found[tuple(ids)] = None
    return [[*ids] for ids in found]


def check_some_token_is_left(
    params: SamplingParams, end_ids: Collection[int], bad_words: Sequence[Sequence[int]]
) -> None:
    """Raises InvalidRequest if other parameters mask every one of `allowed_token_ids` from the first token on."""
    if not params.allowed_token_ids:
        return
    masked = {word[0] for word in bad_words if len(word) == 1}
    masked |= set(end_ids) if params.min_tokens > 0 else set()
    if masked.issuperset(params.allowed_token_ids):
        raise InvalidRequest(
            "allowed_token_ids has no token that bad_words and min_tokens leave: allow one more",
            param="allowed_token_ids",
        )
