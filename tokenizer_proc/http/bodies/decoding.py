"""Decodes a request's body: bytes to fields, and fields to typed structs. Errors name the field.

    bytes --read--> fields --split--> sampling parameters | the route's own struct
                              `--> 400 that names the field

Fields that ask for nothing are dropped (neutral.py).

The tables of field names are in fields.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

import msgspec
from aiohttp import web

from engine.errors import InvalidRequest
from engine.messages import SamplingParams
from tokenizer_proc.http.bodies import fields as table
from tokenizer_proc.http.bodies import neutral
from tokenizer_proc.http.intake import body_reader

Fields = dict[str, object]
B = TypeVar("B", bound=msgspec.Struct)

_PATH = re.compile(r" - at `(?P<key>key` in `)?\$\.?(?P<path>[^`]*)`$")
_FIELD = re.compile(r"Object (missing required|contains unknown) field `([^`]*)`")
_VALUE = re.compile(r"Invalid (?:enum )?value '([^']*)'$")


async def read(request: web.Request) -> Fields:
    """Returns the fields of the body's JSON object, without nulls.

    Raises InvalidRequest if the body is no JSON object, and the errors of `body_reader.read_json`.
    """
    if request.content_type != "application/json":
        raise InvalidRequest(f"send the body as Content-Type: application/json, not {request.content_type}")
    value = await body_reader.read_json(request)
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {_json_name(value)}")
    return present(value)


def present(fields: Mapping[str, object]) -> Fields:
    """Returns `fields` without those that are null, because null means absent."""
    return {name: value for name, value in fields.items() if value is not None}


def decode(fields: Mapping[str, object], into: type[B], at: str = "") -> B:
    """Converts `fields` to the struct `into`.

    Raises an InvalidRequest that names the wrong field by its path; `at` is the prefix of that path.
    """
    return _convert(_accepted({name: name for name in into.__struct_fields__}, fields, into, at), into, at)


def split(fields: Mapping[str, object], into: type[B], spellings: Mapping[str, str]) -> tuple[B, SamplingParams]:
    """Splits `fields` into the struct `into` and the sampling parameters. Raises InvalidRequest.

    `spellings` maps the names that clients use for sampling parameters to those of SamplingParams.
    """
    own = {name: name for name in into.__struct_fields__}
    sampling = {name: value for name, value in fields.items() if name in spellings and name not in own}
    rest = {name: value for name, value in fields.items() if name not in sampling}
    accepted = _accepted(own, rest, into, "", {*own, *spellings})
    return _convert(accepted, into, ""), params(sampling, spellings)


def spelt(fields: Mapping[str, object], spellings: Mapping[str, str]) -> dict[str, str]:
    """Returns, by parameter of SamplingParams, the name under which the client sent it."""
    return {spellings[name]: name for name in fields if name in spellings}


def params(fields: Mapping[str, object], spellings: Mapping[str, str], at: str = "") -> SamplingParams:
    """Converts `fields` to sampling parameters; `spellings` maps the names that clients use to the parameters.

    Of two names for one parameter the one that asks for something counts, and the newer one (`NEWER`). Raises
    InvalidRequest if others have different values.
    """
    values: Fields = {}
    words: dict[str, str] = {}
    for name, value in _counting(_accepted(spellings, fields, SamplingParams, at), spellings).items():
        field = spellings[name]
        if field in values and values[field] != value:
            raise InvalidRequest(
                f"{words[field]} = {values[field]} and {name} = {value} mean the same and disagree", param=at + name
            )
        values[field], words[field] = value, name
    for one in ("stop", "stop_regex", "bad_words"):
        if isinstance(values.get(one), str):
            values[one] = [values[one]]
    return _convert(values, SamplingParams, at, words)


def _counting(fields: Fields, spellings: Mapping[str, str]) -> Fields:
    """Returns the fields without those that another name for the same parameter overrides."""
    if len({spellings[name] for name in fields}) == len(fields):
        return fields
    asked = {spellings[name] for name, value in fields.items() if value}
    counting = {name: value for name, value in fields.items() if value or spellings[name] not in asked}
    older = {table.NEWER[name] for name in counting if name in table.NEWER}
    return {name: value for name, value in counting.items() if name not in older}


def _accepted(
    names: Mapping[str, str],
    fields: Mapping[str, object],
    into: type[msgspec.Struct],
    at: str,
    known: Collection[str] | None = None,
) -> Fields:
    """Returns the fields that are in `names`, which maps them to those of `into`, and that ask for something.

    Raises InvalidRequest for others that could change the output; `known` are the names to which it may point.
    """
    found = neutral.asking(fields, neutral.struct_type(into), names)
    for name, value in found.items():
        if name in names or name in table.IGNORED or any(_same(value, one) for one in table.NEUTRAL.get(name, ())):
            continue
        raise InvalidRequest(table.refusal(name, names if known is None else known), param=at + name)
    return {name: value for name, value in found.items() if name in names}


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _convert(values: Fields, into: type[B], at: str, words: Mapping[str, str] | None = None) -> B:
    try:
        return msgspec.convert(values, into, str_keys=True)
    except msgspec.ValidationError as error:
        path, reason = _located(str(error), neutral.nested_names(into))
        head = re.split(r"[.\[]", path)[0]
        path = at + (words or {}).get(head, head) + path[len(head) :]
        raise InvalidRequest(f"{path}: {reason}" if path else reason, param=path or None) from error


def _located(message: str, known: Collection[str]) -> tuple[str, str]:
    """Returns (the field's path, a description of its error), parsed from msgspec's message.

    `known` are the names to which the error may point a client who misspelt one.
    """
    match = _PATH.search(message)
    path = match["path"] if match else ""
    text = message[: match.start()] if match else message
    if field := _FIELD.match(text):
        path = f"{path}.{field[2]}" if path else field[2]
        text = "is missing" if field[1] == "missing required" else table.refusal(field[2], known)
    elif (value := _VALUE.match(text)) and value[1] in table.REASONS:
        text += f" ({table.REASONS[value[1]]})"
    elif match and match["key"]:
        text += " as a key"
    return path, text.replace(" | null`", "`").replace("`", "'")


def _json_name(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
