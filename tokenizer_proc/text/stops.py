"""Finds stop strings in text that arrives in increments.

    stop "END"      push "the E"  -> "the "    "E" may begin a stop string, and is held back
                    push "ND of"  -> "", found  text after the match is dropped

The match that ends first wins; of two matches that end at the same place, the longer one. The result therefore does not
depend on how the text is cut into increments.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Finds stop strings in one stream of text. Once a stop string has matched, `push` returns no more text."""

    def __init__(self, stops: Sequence[str], include_match: bool = False) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._include = include_match
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Returns the text that certainly belongs to the output. Sets `matched` once a stop string is complete."""
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
        """Returns the text that was held back. Called at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str | None]:
        """Returns the end of the first match in `text`, and its stop string, which is None without a match."""
        best: tuple[int, str | None] = (len(text) + 1, None)
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and at + len(stop) < best[0]:
                best = (at + len(stop), stop)
        return best

    def _beginning(self, text: str) -> int:
        """Returns the length of the longest suffix of `text` with which a stop string begins."""
        longest = min(len(text), len(self._stops[0]) - 1) if self._stops else 0
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0
