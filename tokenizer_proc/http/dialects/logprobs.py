"""Log-probabilities (raw log-softmax) in each dialect's shape. -9999 stands for minus infinity."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from engine.messages import PositionLogprobs, TokenLogprob
from tokenizer_proc.text.tokenizer import Tokenizer

_FLOOR = -9999.0


def as_raw_json(value: object) -> msgspec.Raw:
    """One of many values of an answer, encoded already.

    A hundred thousand small lists would make the garbage collector slow, and it stalls the event loop.
    """
    return msgspec.Raw(msgspec.json.encode(value))


def floored(token: TokenLogprob) -> float:
    """A log-probability as JSON can hold it."""
    return max(token.logprob, _FLOOR)


def chat(positions: Sequence[PositionLogprobs]) -> dict[str, object]:
    """{"content": [{token, logprob, bytes, top_logprobs: [{token, logprob, bytes}]}]}."""
    content = [_token(one.chosen) | {"top_logprobs": [_token(top) for top in one.top]} for one in positions]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, object]:
    return {"token": token.token, "logprob": floored(token), "bytes": token.bytes}


class LegacyLogprobs:
    """One completion's {tokens, token_logprobs, top_logprobs, text_offset}, made in pieces.

    `text_offset` is where a token's text begins in the choice's text, which includes an echoed prompt. A token that
    completes no character, or that is not shown (a special one), does not advance it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def prompt(
        self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None] | None, text: str
    ) -> dict[str, list[object]]:
        """The piece of the echoed prompt, whose text is `text`. `positions` None: there are no log-probabilities."""
        shape = empty()
        for token_id, position in zip(token_ids, positions or [None] * len(token_ids), strict=True):
            piece = self._bytes.decode(self._tokenizer.token_bytes(token_id))
            _append(shape, self._at, self._tokenizer.token_text(token_id), position)
            shape["top_logprobs"][-1] = as_raw_json(shape["top_logprobs"][-1])
            if text.startswith(piece, self._at):
                self._at += len(piece)
            elif self._at == 0 and piece.startswith(" ") and text.startswith(piece[1:]):
                self._at += len(piece) - 1  # a leading space that sentencepiece added
        self._at = len(text)
        self._bytes.reset()
        return shape

    def generated(self, positions: Sequence[PositionLogprobs]) -> dict[str, list[object]]:
        """The piece of the next generated tokens."""
        shape = empty()
        for position in positions:
            token = position.chosen
            _append(shape, self._at, token.token, position)
            if token.token_id not in self._tokenizer.special_ids:
                self._at += len(self._bytes.decode(bytes(token.bytes)))
        return shape


def joined(one: dict[str, list[object]], other: dict[str, list[object]]) -> dict[str, list[object]]:
    """Two pieces, one after the other."""
    return {name: one[name] + other[name] for name in one}


def empty() -> dict[str, list[object]]:
    """A piece without tokens."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _append(shape: dict[str, list[object]], at: int, token: str, position: PositionLogprobs | None) -> None:
    shape["tokens"].append(token)
    shape["text_offset"].append(at)
    shape["token_logprobs"].append(None if position is None else floored(position.chosen))
    shape["top_logprobs"].append(None if position is None else _best(position))


def _best(position: PositionLogprobs) -> dict[str, float]:
    """The best tokens and the chosen one, by name; of two tokens with the same name, the likelier one."""
    found: dict[str, float] = {}
    for token in [*position.top, position.chosen]:
        name = _name(token)
        found[name] = max(floored(token), found.get(name, _FLOOR))
    return found


def _name(token: TokenLogprob) -> str:
    """The token's text, or, for a part of a character, its bytes as OpenAI writes them: `bytes:\\xe2\\x80`."""
    try:
        bytes(token.bytes).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
    return token.token


Triple = tuple[float | None, int, str | None]


def triple(token: TokenLogprob, with_text: bool) -> Triple:
    """The native (logprob, id, text or null)."""
    return floored(token), token.token_id, token.token if with_text else None


def triples(positions: Sequence[PositionLogprobs], with_text: bool) -> list[Triple]:
    """The chosen tokens."""
    return [triple(position.chosen, with_text) for position in positions]


def top_triples(positions: Sequence[PositionLogprobs | None], with_text: bool) -> list[msgspec.Raw | None]:
    """The best tokens of each position; null where nothing precedes it."""
    return [None if one is None else as_raw_json([triple(top, with_text) for top in one.top]) for one in positions]
