"""Where an activated LoRA (aLoRA, 2504.12397) begins to act: at the last occurrence of its invocation in the prompt.

    prompt      p0 p1 [i0 i1] p4 p5 [i0 i1] p8        PEFT's rule: an earlier invocation is ordinary text, and so is a
    computed by base ...............|adapter ...      generated one; a prompt without any is computed by the base alone

Knows tokens, and nothing of adapters.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

WIDTH = array("I").itemsize


def find_invocation(prompt: Sequence[int], invocation: Sequence[int]) -> int | None:
    """The position of the first token of the last occurrence, or None. Token ids fit in 32 bits."""
    text, wanted = array("I", prompt).tobytes(), array("I", invocation).tobytes()
    end = len(text)
    while (at := text.rfind(wanted, 0, end)) % WIDTH:
        if at < 0:
            return None
        end = at + len(wanted) - 1  # this match does not begin at a token
    return at // WIDTH
