"""Finds where an activated LoRA (aLoRA, arXiv 2504.12397) begins to act: the last invocation sequence in the prompt.

    prompt      p0 p1 [i0 i1] p4 p5 [i0 i1] p8        PEFT's rule: earlier and generated invocations are ordinary text;
    computed by base ...............|adapter ...      the base computes all of a prompt that has no invocation

Depends on token ids only, not on adapters.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

WIDTH = array("I").itemsize


def find_invocation(prompt: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Returns the position of the first token of the last occurrence, or None. Token ids must fit in 32 bits."""
    text, wanted = array("I", prompt).tobytes(), array("I", invocation).tobytes()
    end = len(text)
    while (at := text.rfind(wanted, 0, end)) % WIDTH:
        if at < 0:
            return None
        end = at + len(wanted) - 1  # the match begins inside a token: search before it
    return at // WIDTH
