"""Log-probabilities (raw log-softmax) in each dialect's format. Minus infinity is written as -9999."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from engine.messages import PositionLogprobs, TokenLogprob
from tokenizer_proc.text.tokenizer import Tokenizer

_FLOOR = -9999.0


def as_raw_json(value: object) -> msgspec.Raw:
    """Encodes `value`, one of many values of a response, ahead of the rest.

    Kept as objects, a hundred thousand small lists would slow down the garbage collector, which stalls the event loop.
    """
    return msgspec.Raw(msgspec.json.encode(value))


def floored(token: TokenLogprob) -> float:
    """Returns the token's log-probability, but at least -9999, because JSON has no minus infinity."""
    return max(token.logprob, _FLOOR)


def chat(positions: Sequence[PositionLogprobs]) -> dict[str, object]:
    """Returns OpenAI's chat format: {"content": [{token, logprob, bytes, top_logprobs: [{token, logprob, bytes}]}]}."""
    content = [_token(one.chosen) | {"top_logprobs": [_token(top) for top in one.top]} for one in positions]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, object]:
    return {"token": token.token, "logprob": floored(token), "bytes": token.bytes}


class LegacyLogprobs:
    """Makes one completion's {tokens, token_logprobs, top_logprobs, text_offset}, piece by piece.

    `text_offset` is the position at which a token's text begins in the choice's text, which includes an echoed prompt.
    A token that completes no character, or that is a special token and not shown, does not advance it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def prompt(
        self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None] | None, text: str
    ) -> dict[str, list[object]]:
        """Returns the piece for the echoed prompt, whose text is `text`.

        With `positions` None, its log-probabilities are null.
        """
        shape = empty()
        for token_id, position in zip(token_ids, positions or [None] * len(token_ids), strict=True):
            piece = self._bytes.decode(self._tokenizer.token_bytes(token_id))
            _append(shape, self._at, self._tokenizer.token_text(token_id), position)
            shape["top_logprobs"][-1] = as_raw_json(shape["top_logprobs"][-1])
            if text.startswith(piece, self._at):
                self._at += len(piece)
            elif self._at == 0 and piece.startswith(" ") and text.startswith(piece[1:]):
                self._at += len(piece) - 1  # the text lacks the leading space that sentencepiece added
        self._at = len(text)
        self._bytes.reset()
        return shape

    def generated(self, positions: Sequence[PositionLogprobs]) -> dict[str, list[object]]:
        """Returns the piece for the next generated tokens."""
        shape = empty()
        for position in positions:
            token = position.chosen
            _append(shape, self._at, token.token, position)
            if token.token_id not in self._tokenizer.special_ids:
                self._at += len(self._bytes.decode(bytes(token.bytes)))
        return shape


def joined(one: dict[str, list[object]], other: dict[str, list[object]]) -> dict[str, list[object]]:
    """Returns the two pieces joined into one, `one` first."""
    return {name: one[name] + other[name] for name in one}


def empty() -> dict[str, list[object]]:
    """Returns a piece without tokens."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _append(shape: dict[str, list[object]], at: int, token: str, position: PositionLogprobs | None) -> None:
    shape["tokens"].append(token)
    shape["text_offset"].append(at)
    shape["token_logprobs"].append(None if position is None else floored(position.chosen))
    shape["top_logprobs"].append(None if position is None else _best(position))


def _best(position: PositionLogprobs) -> dict[str, float]:
    """Returns the log-probabilities of the best tokens and the chosen one, by name.

    If two tokens have the same name, the likelier one is kept.
    """
    found: dict[str, float] = {}
    for token in [*position.top, position.chosen]:
        name = _name(token)
        found[name] = max(floored(token), found.get(name, _FLOOR))
    return found


def _name(token: TokenLogprob) -> str:
    """Returns the token's text, or for a part of a character its bytes as OpenAI writes them: `bytes:\\xe2\\x80`."""
    try:
        bytes(token.bytes).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
    return token.token


Triple = tuple[float | None, int, str | None]


def triple(token: TokenLogprob, with_text: bool) -> Triple:
    """Returns a token in SGLang's format: (logprob, id, text), with text None unless `with_text` is set."""
    return floored(token), token.token_id, token.token if with_text else None


def triples(positions: Sequence[PositionLogprobs], with_text: bool) -> list[Triple]:
    """Returns the chosen token of each position in SGLang's format."""
    return [triple(position.chosen, with_text) for position in positions]


def top_triples(positions: Sequence[PositionLogprobs | None], with_text: bool) -> list[msgspec.Raw | None]:
    """Returns the best tokens of each position in SGLang's format, and None for a position that is None.

    The prompt's first position is None, because no token precedes it.
    """
    return [None if one is None else as_raw_json([triple(top, with_text) for top in one.top]) for one in positions]
