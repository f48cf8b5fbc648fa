"""Splits a tokenizer.json into its parts, to make tokenizers that share the largest part, the model.

    {"added_tokens": [...], "normalizer", "pre_tokenizer", "post_processor", "decoder": small | "model": nearly all}

The tokenizer.json of an adapter that adds tokens has the same model as the base's, byte for byte, and other small
parts. Parsing the whole file again would hold the GIL for a second and take a hundred megabytes.
"""

from __future__ import annotations

import copy
import secrets
from typing import Any

import msgspec
import tokenizers

from tokenizer_proc.text.token_bytes import Pieces
from tokenizer_proc.text.tokenizer import Tokenizer

ANY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}
PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


class _ModelField(msgspec.Struct):
    model: Any = None


class TokenizerSections(msgspec.Struct):
    """The fields of a tokenizer.json, without truncation and padding, which are not used."""

    model: msgspec.Raw = msgspec.Raw()
    added_tokens: list[dict[str, Any]] = []
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None

    @classmethod
    def read(cls, raw: bytes) -> TokenizerSections:
        """Decodes `raw`, the content of a tokenizer.json. Raises one of engine.ipc.DECODE_ERRORS if it is malformed."""
        return msgspec.json.decode(raw, type=cls)

    @classmethod
    def around(cls, raw: bytes, model: bytes, most: int) -> TokenizerSections | None:
        """Decodes `raw` if it has the model `model`, byte for byte, and at most `most` bytes around it.

        Returns None for another model. Raises one of engine.ipc.DECODE_ERRORS if the small parts are malformed.
        """
        at = raw.find(model) if len(model) <= len(raw) <= len(model) + most else -1
        if at < 0:
            return None
        mark = secrets.token_hex(16)
        small = b"%b%b%b" % (raw[:at], msgspec.json.encode(mark), raw[at + len(model) :])
        if msgspec.json.decode(small, type=_ModelField).model != mark:  # the bytes were found in another place
            return None
        return msgspec.structs.replace(cls.read(small), model=msgspec.Raw(model))

    @property
    def small(self) -> list[Any]:
        """All parts except the model."""
        return [self.added_tokens, *(getattr(self, name) for name in PIPELINE)]

    @property
    def patterns(self) -> frozenset[str]:
        """The regular expressions in the small parts."""
        found: set[str] = set()
        unread: list[Any] = [self.small]
        while unread:
            one = unread.pop()
            if isinstance(one, dict):
                found |= {value for name, value in one.items() if name == "Regex" and isinstance(value, str)}
                unread += one.values()
            elif isinstance(one, list):
                unread += one
        return frozenset(found)

    def over(self, base: Tokenizer) -> Tokenizer | None:
        """Returns a tokenizer of these small parts and the model of `base`, which must equal the model here.

        Returns None if an added token would get an id other than the file's. Raises the library's own errors.
        """
        parts = {name: getattr(self, name) for name in PIPELINE}
        skeleton = tokenizers.Tokenizer.from_str(msgspec.json.encode({"model": ANY_MODEL, **parts}).decode())
        backend = tokenizers.Tokenizer(base.backend.model)
        for name in PIPELINE:
            if getattr(skeleton, name) is not None:
                setattr(backend, name, getattr(skeleton, name))
        wanted = sorted(self.added_tokens, key=lambda token: int(token["id"]))
        options = [{name: value for name, value in token.items() if name != "id"} for token in wanted]
        backend.add_tokens([tokenizers.AddedToken(**each) for each in options])
        found = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
        if found != {token["id"]: token["content"] for token in wanted}:
            return None
        backend.decode(backend.encode("a").ids)  # raises if parts of it refer to missing tokens
        return _like(base, backend)


def _like(base: Tokenizer, backend: tokenizers.Tokenizer) -> Tokenizer:
    """Returns the same as `Tokenizer(backend)`, but without reading every token of the model."""
    made, added = copy.copy(base), backend.get_added_tokens_decoder()
    made.backend, made.pieces = backend, Pieces(backend)
    made.special_ids = frozenset(number for number, token in added.items() if token.special)
    made.vocab_size = max([base.vocab_size, *(number + 1 for number in added)])
    made.longest_token = max([base.longest_token, *(len(token.content) for token in added.values())])
    return made.unnamed()
