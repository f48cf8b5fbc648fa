"""Regular expressions that end an output (`stop_regex`), matched by RE2 in time linear in the text.

    stop_regex [0-9]+\\.    tokens "Step", " 12", "."    the token that completes a match is the last; its text stays

Unlike a stop string, a match is not cut off, because text that may begin a match is already on its way to the client.
After each token the last WINDOW characters are searched, so a longer match is not found. RE2 has no back references and
no look-around; expressions with them are refused, as their matching may take exponential time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidRequest

MAX_PATTERNS = 8
MAX_CHARACTERS = 256
MAX_PROGRAM = 1000  # the size of a compiled expression, which bounds the time of a search
MEMORY_BYTES = 1 << 20
WINDOW = 1024


class StopPatterns:
    """Looks for the expressions in one stream of text. `matched` is the first one that was found, as it was given."""

    def __init__(self, expressions: Sequence[str]) -> None:
        self._patterns = [(expression, compiled(expression)) for expression in expressions]
        self._tail = ""
        self._is_cut = False
        self.matched: str | None = None

    def push(self, text: str) -> bool:
        """Appends the text of one token. Returns whether an expression has matched."""
        if not self._patterns or self.matched is not None:
            return self.matched is not None
        tail = self._tail + text
        begin = max(0, len(tail) - WINDOW)
        context = max(0, begin - 1)  # ^ and \b look at the character before the window
        self._is_cut = self._is_cut or begin > 0
        self._tail = tail[context:]
        for expression, pattern in self._patterns:
            if pattern.search(self._tail, 1 if self._is_cut else 0) is not None:
                self.matched = expression
                return True
        return False


def check_patterns(expressions: Sequence[str]) -> None:
    """Raises an InvalidRequest that names the expression that cannot be used."""
    if len(expressions) > MAX_PATTERNS:
        raise InvalidRequest(
            f"stop_regex takes at most {MAX_PATTERNS} expressions, got {len(expressions)}", param="stop_regex"
        )
    for expression in expressions:
        compiled(expression)


@functools.lru_cache(maxsize=64)
def compiled(expression: str) -> Any:
    """Returns the compiled expression. Raises InvalidRequest if RE2 refuses it, or if it matches an empty text."""
    import re2  # loaded by the first request with an expression

    shown = expression[:MAX_CHARACTERS]
    if not 0 < len(expression) <= MAX_CHARACTERS:
        raise InvalidRequest(f"an expression in stop_regex has 1 to {MAX_CHARACTERS} characters", param="stop_regex")
    options = re2.Options()
    options.max_mem, options.log_errors = MEMORY_BYTES, False
    try:
        pattern = re2.compile(expression, options)
    except (re2.error, UnicodeEncodeError) as error:
        reason = error.args[0].decode("utf-8", "replace") if isinstance(error.args[0], bytes) else str(error)
        raise InvalidRequest(f"stop_regex `{shown}` cannot be matched by RE2: {reason}", param="stop_regex") from error
    if pattern.programsize > MAX_PROGRAM:
        raise InvalidRequest(f"stop_regex `{shown}` is too large", param="stop_regex")
    if pattern.search("") is not None:
        raise InvalidRequest(
            f"stop_regex `{shown}` matches an empty text, so that it would end every output at once", param="stop_regex"
        )
    return pattern
