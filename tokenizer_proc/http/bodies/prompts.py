"""The prompts of a body, and fields whose value is given either once or once for each prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar, cast

from engine.errors import InvalidRequest

T = TypeVar("T")

PACE = 128  # prompts of a call that are prepared at once

TokenIds = list[int]
PromptField = str | list[str | int | list[int]]  # one text, a list of texts, token ids, or lists of token ids


def prompts(value: PromptField, name: str, most: int) -> list[str | TokenIds]:
    """Returns the prompts in `value`, the body's field `name`.

    Raises InvalidRequest for an empty list, for more than `most` prompts, or for a list of mixed kinds.
    """
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequest(f"{name} is an empty list", param=name)
    kinds = set(map(type, value))  # of a million token ids, which a comprehension would take long for
    if len(kinds) > 1:
        raise InvalidRequest(f"{name} mixes texts, token ids and lists: send one kind", param=name)
    if kinds == {int}:
        return [cast(TokenIds, value)]
    if len(value) > most:
        raise InvalidRequest(f"{name} holds {len(value)} prompts; one call takes at most {most}: split it", param=name)
    return [one for one in value if not isinstance(one, int)]


async def paced(items: Iterable[T]) -> AsyncIterator[T]:
    """Yields `items`, one for each prompt, and lets the event loop go on after each PACE of them."""
    for place, item in enumerate(items):
        if place % PACE == PACE - 1:
            await asyncio.sleep(0)
        yield item


def is_single(value: PromptField) -> bool:
    """Returns whether `value` is one prompt, as opposed to a list of prompts."""
    return isinstance(value, str) or (len(value) > 0 and isinstance(value[0], int))


def spread(value: T | list[T], size: int, name: str) -> list[T]:
    """Returns a list with a value for each of `size` prompts. `value` is one for all prompts, or a list of values.

    Raises InvalidRequest if the list's length is not `size`; `name` is the body's field.
    """
    if not isinstance(value, list):
        return [value] * size
    if len(value) != size:
        raise InvalidRequest(f"{name} has {len(value)} entries for {size} prompts", param=name)
    return value
