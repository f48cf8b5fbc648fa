"""Stop strings, found across increments of text. Knows nothing of tokens.

    stop "END"      push "the E"  -> "the "    "E" may begin a stop string, and is held back
                    push "ND of"  -> "", found  what follows the match is dropped

The match that is complete first wins; of two that end together, the longer one. So the result does not depend on how
the text was cut into increments.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """One stream of text. Once `matched` is set, no more text is returned."""

    def __init__(self, stops: Sequence[str], include_match: bool = False) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._include = include_match
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that certainly belongs to the answer. Sets `matched` when a stop string is complete."""
        if self.matched is not None:
            return ""
        text = self._held + text
        end, stop = self._find(text)
        if stop is not None:
            self._held, self.matched = "", stop
            return text[:end] if self._include else text[: end - len(stop)]
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str | None]:
        """Where the first match ends, and its stop string."""
        best: tuple[int, str | None] = (len(text) + 1, None)
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and at + len(stop) < best[0]:
                best = (at + len(stop), stop)
        return best

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), len(self._stops[0]) - 1) if self._stops else 0
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0
