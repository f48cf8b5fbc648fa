"""Fields that ask for nothing: false, 0, null, and empty texts, lists and objects. They never refuse a body.

    unknown field                  dropped
    known field, empty             dropped, so that its default applies; kept if the field is a prompt (`SUBSTANCE`)
    known field, false or 0        kept if its type takes the value (`"temperature": 0`), false for 0 of a boolean,
                                   else dropped
    a value that asks for more     left as it is, so that it is checked like every other

The same holds inside objects that are fields, such as `stream_options` and the messages of a chat.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import msgspec
from msgspec.inspect import (
    AnyType,
    BoolType,
    Field,
    FloatType,
    IntType,
    ListType,
    LiteralType,
    StrType,
    StructType,
    Type,
    UnionType,
)

from tokenizer_proc.http.bodies.fields import OFF_AT_ZERO, SUBSTANCE

_ABSENT = object()


@functools.cache
def struct_type(struct: type[msgspec.Struct]) -> StructType:
    """Returns the description of the struct's fields."""
    found = msgspec.inspect.type_info(struct)
    assert isinstance(found, StructType)
    return found


@functools.cache
def nested_names(struct: type[msgspec.Struct]) -> frozenset[str]:
    """Returns the names of the fields of `struct` and of the structs inside it."""
    return frozenset(_names(struct_type(struct)))


def is_nothing(value: object) -> bool:
    """Returns whether `value` asks for nothing, as an object of such values does too."""
    return not value or (isinstance(value, dict) and not any(value.values()))


def asking(fields: Mapping[str, object], struct: StructType, names: Mapping[str, str]) -> dict[str, object]:
    """Returns the fields without those that ask for nothing, as the module's docstring says.

    `names` maps the names that clients use to those of the struct's fields.
    """
    known = {field.encode_name: field for field in struct.fields}
    kept: dict[str, object] = {}
    for name, value in fields.items():
        field = known.get(names.get(name, ""))
        settled = _settled(value, field) if field is not None else (_ABSENT if is_nothing(value) else value)
        if settled is not _ABSENT:
            kept[name] = settled
    return kept


def _settled(value: object, field: Field) -> object:
    """Returns the value of a known field, or _ABSENT if it asks for nothing."""
    if value or field.required:
        return _pruned(value, field.type)
    if value is None or (value == 0 and field.encode_name in OFF_AT_ZERO):
        return _ABSENT
    if isinstance(value, (str, list, dict)) and field.encode_name not in SUBSTANCE:
        return _ABSENT
    if any(_takes(one, value) for one in _members(field.type)):
        return 0 if isinstance(value, float) else value  # 0.0 is no integer to msgspec
    is_zero = isinstance(value, int | float) and not isinstance(value, bool)
    return False if is_zero and any(isinstance(one, BoolType) for one in _members(field.type)) else _ABSENT


def _pruned(value: object, type_: Type) -> object:
    """Returns the value without fields that ask for nothing in the structs inside it."""
    for one in _members(type_):
        if isinstance(value, dict) and isinstance(one, StructType):
            names = {field.encode_name: field.encode_name for field in one.fields}
            tag = {name: value[name] for name in (one.tag_field,) if name is not None and name in value}
            return asking(value, one, names) | tag
        if isinstance(value, list) and isinstance(one, ListType) and _has_structs(one.item_type):
            return [_pruned(each, one.item_type) for each in value]
    return value


def _has_structs(type_: Type) -> bool:
    """Returns whether a value of this type may be a struct, or a list of some. Other lists are not walked through."""
    return any(
        isinstance(one, StructType) or (isinstance(one, ListType) and _has_structs(one.item_type))
        for one in _members(type_)
    )


def _takes(type_: Type, value: object) -> bool:
    match type_:
        case AnyType():
            return True
        case BoolType():
            return isinstance(value, bool)
        case IntType() | FloatType():
            return isinstance(value, int | float) and not isinstance(value, bool)
        case StrType():
            return isinstance(value, str)
        case ListType():
            return isinstance(value, list)
        case LiteralType():
            return value in type_.values
    return False


def _members(type_: Type) -> tuple[Type, ...]:
    return type_.types if isinstance(type_, UnionType) else (type_,)


def _names(type_: Type) -> Iterator[str]:
    for one in _members(type_):
        if isinstance(one, StructType):
            for field in one.fields:
                yield field.encode_name
                yield from _names(field.type)
        elif isinstance(one, ListType):
            yield from _names(one.item_type)
