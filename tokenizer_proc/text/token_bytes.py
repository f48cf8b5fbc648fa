"""The exact bytes of every token, derived from the tokenizer's decoder.

Decoder-only models use one of two families of decoders:

    byte level    "Ġcaf" "Ã©"           -> b" caf" b"\xc3\xa9"        a character encodes a byte
    sentencepiece "▁caf" "<0xC3>" "<0xA9>" -> b" caf" b"\xc3" b"\xa9"  ▁ is a space, <0x..> a byte

In both, the text of a sequence is the concatenation of its tokens' bytes, except for a leading space that sentencepiece
adds and its decoder removes. Any other decoder is not `additive`: only the library itself can decode a sequence.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SPACE = "\u2581"  # ▁


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte-level alphabet of GPT-2, from character to byte.

    Printable bytes are written as themselves, the others as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [leaf for part in decoder["decoders"] for leaf in _flat(part)]
    return [decoder]


def _is_space_rule(part: dict[str, Any]) -> bool:
    return bool(part["type"] == "Replace" and part["pattern"] == {"String": _SPACE} and part["content"] == " ")


def _is_strip_rule(part: dict[str, Any]) -> bool:
    return part["type"] == "Strip" and (part["content"], part["start"], part["stop"]) == (" ", 1, 0)


class Pieces:
    """A map from token id to the token's bytes.

    `additive` is True if the text of a sequence is the concatenation of its tokens' bytes.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        decoder = backend.decoder
        parts = _flat(None if decoder is None else json.loads(decoder.__getstate__()))
        kinds = [part["type"] for part in parts]
        self._byte_level = kinds == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        self._strips_space = kinds == ["Replace", "ByteFallback", "Fuse", "Strip"] and _is_strip_rule(parts[3])
        self._metaspace = kinds in (["Metaspace"], ["ByteFallback", "Metaspace"]) and (
            parts[-1]["replacement"] == _SPACE
        )
        self._drops_marks = self._metaspace and parts[-1]["prepend_scheme"] != "never"
        plain = self._strips_space or kinds == ["Replace", "ByteFallback", "Fuse"]
        self.additive = self._byte_level or self._metaspace or (plain and _is_space_rule(parts[0]))
        self._cache: dict[int, bytes] = {}
        self._shown: dict[int, tuple[str, list[int]]] = {}

    def __getitem__(self, token_id: int) -> bytes:
        """Returns the bytes that a token adds to a text when it is not the first token; empty for an unknown id."""
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = self._bytes(token_id)
        return piece

    def shown(self, token_id: int) -> tuple[str, list[int]]:
        """Returns a token's text, and its bytes as numbers. The list is shared: do not change it."""
        found = self._shown.get(token_id)
        if found is None:
            piece = self[token_id]
            found = self._shown[token_id] = piece.decode("utf-8", "replace"), list(piece)
        return found

    def first(self, token_id: int) -> bytes:
        """Returns the bytes that a token adds as the first token of a text."""
        if self._drops_marks:
            token = self._backend.id_to_token(token_id) or ""
            return self._sentencepiece_bytes(token.replace(_SPACE, ""))
        piece = self[token_id]
        return piece[1:] if self._strips_space and piece.startswith(b" ") else piece

    def _bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            if all(char in _ALPHABET for char in token):
                return bytes(_ALPHABET[char] for char in token)
            return token.encode()
        if self.additive:
            return self._sentencepiece_bytes(token)
        return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()

    def _sentencepiece_bytes(self, token: str) -> bytes:
        match = _BYTE_TOKEN.match(token) if self._byte_fallback else None
        return bytes([int(match[1], 16)]) if match else token.replace(_SPACE, " ").encode()
