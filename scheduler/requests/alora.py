"""Where an activated adapter (2504.12397) begins to act: at the first token of the last invocation in the prompt.

    prompt      p0 p1 [i0 i1] p4 p5 [i0 i1] p8        that is PEFT's rule: an earlier invocation is text like any other,
    computed by base ...............|adapter ...      one that is generated as well, and without any it is the base's

Knows tokens, and nothing of adapters.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

WIDTH = array("I").itemsize


def invoked_at(prompt: Sequence[int], invocation: Sequence[int]) -> int | None:
    """The position of the last occurrence's first token; None if there is none. Token ids are of 32 bits."""
    text, wanted = array("I", prompt).tobytes(), array("I", invocation).tobytes()
    end = len(text)
    while (at := text.rfind(wanted, 0, end)) % WIDTH:
        if at < 0:
            return None
        end = at + len(wanted) - 1  # it lay across tokens
    return at // WIDTH
