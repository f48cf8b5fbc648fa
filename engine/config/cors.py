"""The flags about cross-origin calls of web pages: which origins, methods and headers are allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from engine.errors import ConfigError

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#]+")
_NAME = re.compile(r"\*|[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class Cors(msgspec.Struct, frozen=True, kw_only=True):
    """What web pages of other origins may do. Without `origins`, nothing; "*" allows every one.

    Empty `methods` and `headers` allow all.
    """

    origins: list[str] = []
    methods: list[str] = []
    headers: list[str] = []
    credentials: bool = False


def parse_cors(origins: Sequence[str], methods: Sequence[str], headers: Sequence[str], credentials: bool) -> Cors:
    """Returns the parsed flags; the values of each are words, or one JSON list as vLLM takes it.

    Raises ConfigError for an origin or name that is none, and for flags that mean nothing without --allowed-origins.
    """
    found = Cors(
        origins=_words(origins, "--allowed-origins", _ORIGIN, "such as https://example.org, or *"),
        methods=_words(methods, "--allowed-methods", _NAME, "such as POST, or *"),
        headers=_words(headers, "--allowed-headers", _NAME, "such as Authorization, or *"),
        credentials=credentials,
    )
    if not found.origins and (methods or headers or credentials):
        raise ConfigError("--allowed-methods, --allowed-headers and --allow-credentials need --allowed-origins")
    return found


def _words(values: Sequence[str], flag: str, form: re.Pattern[str], example: str) -> list[str]:
    words = [*values]
    if len(words) == 1 and words[0].lstrip().startswith("["):
        try:
            words = msgspec.json.decode(words[0], type=list[str])
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{flag} {words[0]}: no JSON list of texts: {error}") from error
    for word in words:
        if not form.fullmatch(word):
            raise ConfigError(f"{flag} {word}: {example}")
    return [] if form is _NAME and "*" in words else words
