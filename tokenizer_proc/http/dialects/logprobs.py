"""Log-probabilities (raw log-softmax) in each dialect's format. Minus infinity is written as -9999."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from engine.messages import PositionLogprobs, TokenLogprob
from tokenizer_proc.http.encoding import SLICE, JsonArray
from tokenizer_proc.requests.packed_logprobs import PackedLogprobs
from tokenizer_proc.text.tokenizer import Tokenizer

_FLOOR = -9999.0


def floored(token: TokenLogprob) -> float:
    """Returns the token's log-probability, but at least -9999, because JSON has no minus infinity."""
    return max(token.logprob, _FLOOR)


def by_id(token_id: int) -> str:
    """Returns the name of a token with `return_tokens_as_token_ids`, vLLM's field: `token_id:17`."""
    return f"token_id:{token_id}"


def chat(slices: Iterable[Sequence[PositionLogprobs | None]], as_ids: bool = False) -> dict[str, object]:
    """Returns OpenAI's chat format: {"content": [{token, logprob, bytes, top_logprobs: [{token, logprob, bytes}]}]}.

    With `as_ids`, each token is named by its id.
    """
    content = JsonArray()
    for positions in slices:
        content.add(
            [
                _token(one.chosen, as_ids) | {"top_logprobs": [_token(top, as_ids) for top in one.top]}
                for one in filled(positions)
            ]
        )
    return {"content": content.raw(), "refusal": None}


def filled(positions: Iterable[PositionLogprobs | None]) -> list[PositionLogprobs]:
    """Returns the positions that have log-probabilities, as those of generated tokens all do."""
    return [one for one in positions if one is not None]


def _token(token: TokenLogprob, as_ids: bool) -> dict[str, object]:
    name = by_id(token.token_id) if as_ids else token.token
    return {"token": name, "logprob": floored(token), "bytes": token.bytes}


def of_prompt(slices: Iterable[Sequence[PositionLogprobs | None]], top: int) -> msgspec.Raw:
    """Returns vLLM's format of a prompt's log-probabilities, with the `top` best tokens of each position.

    Each position is an object {id: {logprob, rank, decoded_token}} of the best tokens and the prompt's own, whose rank
    is null where it is not among the best ones; the first position is null, because no token precedes it.
    """
    found = JsonArray()
    for positions in slices:
        found.add([None if one is None else _ranked(one, top) for one in positions])
    return found.raw()


def _ranked(position: PositionLogprobs, top: int) -> dict[str, object]:
    ranks = {token.token_id: rank for rank, token in enumerate(position.top, start=1)}
    return {
        str(token.token_id): {
            "logprob": floored(token),
            "rank": ranks.get(token.token_id),
            "decoded_token": token.token,
        }
        for token in [position.chosen, *position.top[:top]]
    }


class LegacyLogprobs:
    """Makes one completion's {tokens, token_logprobs, top_logprobs, text_offset}, piece by piece.

    `text_offset` is the position at which a token's text begins in the choice's text, which includes an echoed prompt.
    A token that completes no character, or that is a special token and not shown, does not advance it. The `top` best
    tokens are shown; with `as_ids`, each token is named by its id.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._as_ids = as_ids
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def prompt(self, token_ids: Sequence[int], positions: PackedLogprobs | None, text: str) -> LegacyPiece:
        """Returns the piece for the echoed prompt, whose text is `text`.

        With `positions` None, its log-probabilities are null.
        """
        piece, place = LegacyPiece(), 0
        for some in _nulls(len(token_ids)) if positions is None else positions.slices():
            ids = token_ids[place : place + len(some)]
            names = [by_id(each) if self._as_ids else self._tokenizer.token_text(each) for each in ids]
            piece.add([self._shown(token, text) for token in ids], names, some, self._best)
            place += len(some)
        self.skip(text)
        return piece

    def skip(self, text: str) -> None:
        """Continues after a prompt with the text `text`, whose piece was made before."""
        self._at = len(text)
        self._bytes.reset()

    def generated(self, slices: Iterable[Sequence[PositionLogprobs | None]]) -> LegacyPiece:
        """Returns the piece for the next generated tokens."""
        piece = LegacyPiece()
        for some in map(filled, slices):
            offsets = []
            for position in some:
                offsets.append(self._at)
                if position.chosen.token_id not in self._tokenizer.special_ids:
                    self._at += len(self._bytes.decode(bytes(position.chosen.bytes)))
            piece.add(offsets, [self._named(position.chosen) for position in some], some, self._best)
        return piece

    def _named(self, token: TokenLogprob) -> str:
        return by_id(token.token_id) if self._as_ids else token.token

    def _best(self, position: PositionLogprobs) -> dict[str, float]:
        """Returns the log-probabilities of the best tokens and the chosen one, by name.

        If two tokens have the same name, the likelier one is kept.
        """
        found: dict[str, float] = {}
        for token in [*position.top[: self._top], position.chosen]:
            name = by_id(token.token_id) if self._as_ids else _name(token)
            found[name] = max(floored(token), found.get(name, _FLOOR))
        return found

    def _shown(self, token_id: int, text: str) -> int:
        """Returns where a token of the prompt begins in `text`, and continues after it."""
        at, shown = self._at, self._bytes.decode(self._tokenizer.token_bytes(token_id))
        if text.startswith(shown, at):
            self._at += len(shown)
        elif at == 0 and shown.startswith(" ") and text.startswith(shown[1:]):
            self._at += len(shown) - 1  # the text lacks the leading space that sentencepiece added
        return at


class LegacyPiece:
    """The arrays for successive tokens of one completion, encoded."""

    def __init__(self) -> None:
        self._arrays = {name: JsonArray() for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}

    def add(
        self,
        offsets: Sequence[int],
        tokens: Sequence[str],
        positions: Sequence[PositionLogprobs | None],
        best: Callable[[PositionLogprobs], dict[str, float]],
    ) -> None:
        """Appends the tokens of one slice. `best` returns the best tokens of a position."""
        arrays = self._arrays
        arrays["tokens"].add(tokens)
        arrays["token_logprobs"].add([None if one is None else floored(one.chosen) for one in positions])
        arrays["top_logprobs"].add([None if one is None else best(one) for one in positions])
        arrays["text_offset"].add(offsets)

    def add_piece(self, other: LegacyPiece) -> None:
        """Appends another piece."""
        for name, array in self._arrays.items():
            array.add_array(other._arrays[name])

    def raw(self) -> dict[str, msgspec.Raw]:
        """Returns the arrays by name, to be put into the body."""
        return {name: array.raw() for name, array in self._arrays.items()}


def _nulls(count: int) -> Iterator[list[None]]:
    """Yields slices of `count` positions without log-probabilities."""
    for at in range(0, count, SLICE):
        yield [None] * min(SLICE, count - at)


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


def triples(positions: Iterable[PositionLogprobs], with_text: bool) -> list[Triple]:
    """Returns the chosen token of each position in SGLang's format."""
    return [triple(position.chosen, with_text) for position in positions]


def asked_triples(positions: Iterable[PositionLogprobs | None], with_text: bool) -> list[list[Triple] | None]:
    """Returns the tokens of `token_ids_logprob` of each position, and None for a position that is None."""
    return [None if one is None else [triple(token, with_text) for token in one.asked] for one in positions]


def top_triples(positions: Iterable[PositionLogprobs | None], with_text: bool) -> list[list[Triple] | None]:
    """Returns the best tokens of each position in SGLang's format, and None for a position that is None.

    The prompt's first position is None, because no token precedes it.
    """
    return [None if one is None else [triple(top, with_text) for top in one.top] for one in positions]
