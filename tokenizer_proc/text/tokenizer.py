"""The model's tokenizer: tokenizer.json through the `tokenizers` library, special tokens from tokenizer_config.json.

A beginning-of-sequence token is added only if the post-processor in tokenizer.json adds one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import msgspec
import tokenizers

from engine.directory import Directory
from engine.errors import ConfigError, InvalidRequest
from engine.ipc import DECODE_ERRORS
from tokenizer_proc.text import files
from tokenizer_proc.text.token_bytes import Pieces

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class _NamedToken(msgspec.Struct):
    content: str


class _TokenizerConfig(msgspec.Struct):
    """The fields of tokenizer_config.json (or special_tokens_map.json) that name special tokens."""

    bos_token: str | _NamedToken | None = None
    eos_token: str | _NamedToken | None = None
    unk_token: str | _NamedToken | None = None
    pad_token: str | _NamedToken | None = None
    sep_token: str | _NamedToken | None = None
    cls_token: str | _NamedToken | None = None
    mask_token: str | _NamedToken | None = None


def special_tokens(directory: Directory) -> dict[str, str]:
    """Returns the special tokens that the files of `directory` name. Raises ConfigError for unreadable files."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later file overrides the earlier one
        raw = files.read(directory, name, files.MAX_CONFIG)
        if raw is None:
            continue
        try:
            config = msgspec.json.decode(raw, type=_TokenizerConfig)
        except DECODE_ERRORS as error:
            raise ConfigError(f"{directory.path / name} cannot be read: {error}") from error
        for field in _SPECIAL_NAMES:
            value: str | _NamedToken | None = getattr(config, field)
            if value is not None:
                named[field] = value.content if isinstance(value, _NamedToken) else value
    return named


def is_from_library(error: BaseException) -> bool:
    """Returns whether the `tokenizers` library may have raised `error`.

    The library raises Exceptions, and PanicException, which is only a BaseException.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class TooManyTokens(InvalidRequest):
    """A text has more tokens than the caller can use. `count` is their number."""

    def __init__(self, count: int, most: int) -> None:
        super().__init__(f"the text has {count} tokens; at most {most} are possible here", param="prompt")
        self.count = count


class Tokenizer:
    """Encodes text to ids and decodes ids. `special_tokens` maps bos_token, eos_token, ... to their texts."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.pieces = Pieces(backend)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.longest_token = max(map(len, vocab), default=0)  # the number of characters of the longest token
        self._origin: Tokenizer | None = None
        self._name(special_tokens or {})

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Returns the tokenizer in `directory`.

        Raises ConfigError if there is no tokenizer.json (the error says how to make one) or it cannot be read.
        """
        with files.open_directory(directory) as opened:
            raw = None if opened is None else files.read(opened, "tokenizer.json", files.MAX_TOKENIZER)
            named = special_tokens(opened) if opened is not None else {}
        if raw is None:
            raise ConfigError(
                f"{directory} has no tokenizer.json. Convert its tokenizer once with transformers "
                "(AutoTokenizer.from_pretrained(directory).save_pretrained(directory)), "
                "or name another directory with --tokenizer-path."
            )
        return cls.parse(raw, Path(directory) / "tokenizer.json", named)

    @classmethod
    def parse(cls, raw: bytes, path: Path, named: dict[str, str]) -> Tokenizer:
        """Returns the tokenizer of a tokenizer.json with the content `raw`.

        `path` is where the file was read, for errors; `named` are the special tokens. Raises ConfigError for a file
        that cannot be used.
        """
        try:
            made = cls(tokenizers.Tokenizer.from_str(raw.decode()), named)
            made.backend.decode(made.backend.encode("a").ids)  # raises if parts of it refer to missing tokens
        except ConfigError:
            raise
        except BaseException as error:
            if not is_from_library(error):
                raise
            raise ConfigError(f"{path} cannot be read: {error}") from error
        return made

    def named(self, special_tokens: dict[str, str]) -> Tokenizer:
        """Returns a copy of this tokenizer with other special tokens, or itself if they are the same."""
        if special_tokens == self.special_tokens:
            return self
        other = copy.copy(self)
        other._origin = self.origin  # keeps the original alive for as long as the copy
        other._name(special_tokens)
        return other

    def unnamed(self) -> Tokenizer:
        """Removes the names of special tokens, and makes this tokenizer its own origin. Returns this tokenizer."""
        self._origin = None
        self._name({})
        return self

    @property
    def origin(self) -> Tokenizer:
        """The tokenizer that this one was copied from to change its special tokens, or this tokenizer itself."""
        return self._origin or self

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Returns the ids of `text`.

        Raises InvalidRequest if the text is not valid Unicode (a lone surrogate) or the tokenizer cannot encode it, and
        TooManyTokens for more than `most` ids, without making a list of them, which would hold the GIL.
        """
        try:
            # unlike `encode`, the batch functions release the GIL, so that they can run in parallel in a thread
            [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest("the text holds half of a surrogate pair, which is no character") from error
        except BaseException as error:  # e.g. a character outside the vocabulary of a model without an unknown token
            if not is_from_library(error):
                raise
            raise InvalidRequest(f"the model's tokenizer cannot read this text: {error}") from error
        if most is not None and len(encoding) > most:
            raise TooManyTokens(len(encoding), most)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`. Invalid UTF-8 becomes U+FFFD."""
        texts: list[str] = self.backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        return texts[0]

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the exact bytes of one token; empty for an unknown id."""
        return self.pieces[token_id]

    def token_text(self, token_id: int) -> str:
        """Returns the text of one token. A part of a character becomes U+FFFD."""
        return self.pieces[token_id].decode("utf-8", "replace")

    def name_of(self, token_id: int) -> str:
        """Returns the token as the vocabulary writes it, such as `Ġhello`; empty for an unknown id."""
        return self.backend.id_to_token(token_id) or ""

    def _name(self, special_tokens: dict[str, str]) -> None:
        self.special_tokens = special_tokens
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)
