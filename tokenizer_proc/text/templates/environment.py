"""The sandboxed jinja2 environment of chat templates, with the functions that templates on the hub expect.

A template can only compute text. Operators with huge results are refused here; loops are not bounded here.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

_MOST_CHARACTERS = 1 << 20
_LARGEST_BASE, _LARGEST_EXPONENT = 1 << 32, 64
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %} ... {% endgeneration %}`, which only renders its content here.

    In training it marks the assistant's text.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja declares `tags` without ClassVar

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, which here also refuses operators whose results would take gigabytes."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Returns the operator's result. Raises SecurityError if it would be too large."""
        if _is_too_large(operator, left, right):
            raise jinja2.exceptions.SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _is_too_large(operator: str, left: Any, right: Any) -> bool:
    if operator == "*":
        pairs = ((left, right), (right, left))
        return any(isinstance(n, int) and hasattr(s, "__len__") and len(s) * n > _MOST_CHARACTERS for s, n in pairs)
    if operator == "**":
        return not (abs(left) <= _LARGEST_BASE and abs(right) <= _LARGEST_EXPONENT)
    return isinstance(left, str) and _WIDE_FORMAT.search(left) is not None


def template_environment() -> jinja2.Environment:
    """Returns a new sandboxed environment for chat templates."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
