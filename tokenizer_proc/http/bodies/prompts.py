"""The prompts of a body, and values that are given once, or once for each prompt. Knows no dialect."""

from __future__ import annotations

from typing import TypeVar

from engine.errors import InvalidRequest

T = TypeVar("T")

TokenIds = list[int]
PromptField = str | list[str | int | list[int]]  # a text, texts, token ids or lists of token ids


def prompts(value: PromptField, name: str, most: int) -> list[str | TokenIds]:
    """The prompts in the field `name`. Raises InvalidRequest for none, for more than `most`, or for mixed kinds."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequest(f"{name} is an empty list", param=name)
    if len({type(one) for one in value}) > 1:
        raise InvalidRequest(f"{name} mixes texts, token ids and lists: send one kind", param=name)
    ids = [one for one in value if isinstance(one, int)]
    if ids:
        return [ids]
    if len(value) > most:
        raise InvalidRequest(f"{name} holds {len(value)} prompts; one call takes at most {most}: split it", param=name)
    return [one for one in value if not isinstance(one, int)]


def is_single(value: PromptField) -> bool:
    """Whether `value` is one prompt, not a list of prompts."""
    return isinstance(value, str) or (len(value) > 0 and isinstance(value[0], int))


def spread(value: T | list[T], size: int, name: str) -> list[T]:
    """`value` for each of `size` prompts: one for all, or a list with one for each."""
    if not isinstance(value, list):
        return [value] * size
    if len(value) != size:
        raise InvalidRequest(f"{name} has {len(value)} entries for {size} prompts", param=name)
    return value
