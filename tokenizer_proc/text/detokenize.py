"""Incremental detokenizer: token ids to text, in whole characters only.

    ids    "▁caf" | 0xC3 | 0xA9 | "!"           the two bytes of é are two tokens
    emits  " caf" |  ""  | "é"  | "!"           held until the character is whole

The text continues the prompt, so a leading space is kept, unless all tokens of the prompt are skipped special tokens.
The emitted pieces together equal the decoded ids, with one exception: sentencepiece's decoder turns a whole run of byte
tokens with one bad byte into U+FFFD, including the whole characters before the bad byte. Here those characters have
already been emitted, and are kept.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokenizer_proc.text.tokenizer import Tokenizer

_CONTEXT = 6  # the number of preceding tokens that are decoded together with the new ones


class Detokenizer:
    """The detokenizer of one stream of generated ids. `push` returns completed text, `flush` the rest at the end."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = all(token in self._skipped for token in prompt)
        self._window = None if tokenizer.pieces.additive else _Window(tokenizer, prompt, skip_special_tokens)

    def push(self, ids: Sequence[int]) -> str:
        """Returns the text that `ids` complete, possibly empty."""
        if self._window is not None:
            return "".join(map(self._window.push, ids))
        return self._bytes.decode(b"".join([self._piece(token) for token in ids if token not in self._skipped]))

    def flush(self) -> str:
        """Returns the text that was held back, with U+FFFD for an incomplete character."""
        return self._window.flush() if self._window is not None else self._bytes.decode(b"", final=True)

    def _piece(self, token: int) -> bytes:
        if not self._at_start:
            return self._pieces[token]
        self._at_start = not self._pieces[token]
        return self._pieces.first(token)


class _Window:
    """The detokenizer for decoders that only the library can run: decodes the last few ids again, emits the new text.

    ids     ... context ... | held (its text ended in a broken character)
    text    <--- known ---->|<-- new, once it is whole -->
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context = list(prompt[-_CONTEXT:])
        self._known = self._decode(self._context)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        self._held.append(token)
        text = self._decode(self._context + self._held)
        if text.endswith("\ufffd") or len(text) <= len(self._known):
            return ""
        new = self._new(text)
        self._context, self._held = (self._context + self._held)[-_CONTEXT:], []
        self._known = self._decode(self._context)
        return new

    def flush(self) -> str:
        return self._new(self._decode(self._context + self._held)) if self._held else ""

    def _new(self, text: str) -> str:
        return text[len(self._known) :] if text.startswith(self._known) else self._decode(self._held)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)
