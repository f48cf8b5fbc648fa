"""The model's chat template: a sandboxed jinja2 environment with what templates of the hub expect in it.

A template comes with the model, so it may compute text and nothing else. Its output is encoded without adding special
tokens: the template writes them itself. Knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import msgspec

from engine.errors import ConfigError, InvalidRequest
from engine.ipc import UNREADABLE
from engine.messages import ChatMessage
from tokenizer_proc.text import files

Value = str | int | float | bool | None

_MOST_CHARACTERS = 1 << 20
_LARGEST_BASE, _LARGEST_EXPONENT = 1 << 32, 64
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")
_MARK = "\u2063\u2063here the answer goes on\u2063\u2063"  # cut at, when the last message is to be continued


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here it just shows them."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

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
    """Also bounds the operators by which a few characters ask for gigabytes. It does not bound loops."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """The operator's result. Raises SecurityError when that would be absurdly large."""
        if _is_absurd(operator, left, right):
            raise jinja2.exceptions.SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _is_absurd(operator: str, left: Any, right: Any) -> bool:
    if operator == "*":
        pairs = ((left, right), (right, left))
        return any(isinstance(n, int) and hasattr(s, "__len__") and len(s) * n > _MOST_CHARACTERS for s, n in pairs)
    if operator == "**":
        return not (abs(left) <= _LARGEST_BASE and abs(right) <= _LARGEST_EXPONENT)
    return isinstance(left, str) and _WIDE_FORMAT.search(left) is not None


def _environment() -> jinja2.Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Named(msgspec.Struct):
    name: str
    template: str


class _Holder(msgspec.Struct):
    """tokenizer_config.json, or chat_template.json of older checkpoints."""

    chat_template: str | list[_Named] | None = None


def _from_json(path: Path) -> str | None:
    raw = files.read(path, files.MAX_CONFIG)
    if raw is None:
        return None
    try:
        template = msgspec.json.decode(raw, type=_Holder).chat_template
    except UNREADABLE as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(template, list):
        return template
    named = {each.name: each.template for each in template}
    if "default" not in named:
        raise ConfigError(f"{path} names the chat templates {sorted(named)} but no `default`: use --chat-template")
    return named["default"]


def _given(template: str) -> str:
    """The text of --chat-template: a file, or the template itself."""
    literal = "{%" in template or "{{" in template
    try:
        if Path(template).is_file():
            return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if not literal:
            raise ConfigError(f"--chat-template {template!r} cannot be read: {error}") from error
    if not literal:
        raise ConfigError(f"--chat-template {template!r} is neither a file nor a jinja template")
    return template


def template_of(directory: Path) -> str | None:
    """The chat template that lies in `directory`, if any. Raises ConfigError for files that make no sense."""
    path = directory / "chat_template.jinja"
    raw = files.read(path, files.MAX_TEMPLATE)
    if raw is not None:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (template := _from_json(directory / name)) is not None:
            return template
    return None


class ChatRenderer(ABC):
    """What makes a prompt of messages, wherever it is computed."""

    source: str | None

    @abstractmethod
    async def prompt(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Value,
    ) -> str:
        """The prompt text. Raises InvalidRequest when there is none for these messages."""


def check_messages(messages: Sequence[ChatMessage], add_generation_prompt: bool, continue_final_message: bool) -> None:
    """Raises InvalidRequest for what no template could make sense of."""
    if not messages:
        raise InvalidRequest("`messages` is empty", param="messages")
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest(
            "`continue_final_message` and `add_generation_prompt` contradict each other: set one of them",
            param="continue_final_message",
        )


class ChatTemplate(ChatRenderer):
    """Messages to prompt text. `source` None: the model has no template, and every chat is refused with a reason."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._template: jinja2.Template | None = None
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise ConfigError(f"the chat template is not valid jinja: line {error.lineno}: {error}") from error
            except Exception as error:  # nested too deeply, absurd numbers: jinja lets them through
                raise ConfigError(f"the chat template cannot be compiled: {_reason(error)}") from error

    @classmethod
    def load(
        cls, directory: str | Path, given: str | None = None, special_tokens: Mapping[str, str] | None = None
    ) -> ChatTemplate:
        """The template `given` (a file or literal), else the one of the tokenizer's directory."""
        source = _given(given) if given is not None else template_of(Path(directory))
        return cls(source, special_tokens)

    async def prompt(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Value,
    ) -> str:
        """The same as `render`, which the model's own template is trusted to do at once."""
        return self.render(messages, add_generation_prompt, continue_final_message, **kwargs)

    def render(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Value,
    ) -> str:
        """The prompt text. Raises InvalidRequest with the template's own words when it refuses the messages."""
        check_messages(messages, add_generation_prompt, continue_final_message)
        turns: list[dict[str, str]] = [msgspec.to_builtins(message) for message in messages]
        if not continue_final_message:
            return self._render(turns, add_generation_prompt, kwargs)
        turns[-1]["content"] += _MARK + " "
        return _cut(self._render(turns, add_generation_prompt, kwargs))

    def _render(self, turns: list[dict[str, str]], add_generation_prompt: bool, kwargs: dict[str, Any]) -> str:
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or start the server with --chat-template",
                param="messages",
                code="no_chat_template",
            )
        values = {"tools": None, "documents": None, **self._special_tokens, **kwargs}
        values |= {"messages": turns, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(values)
        except Exception as error:  # what a template computes may fail in any way
            raise InvalidRequest(f"the chat template refuses this: {_reason(error)}", param="messages") from error


def _reason(error: Exception) -> str:
    """Its words, and for what is no refusal of the template's own the kind of error too, in bounded length."""
    text = str(error)[:500]
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


def _cut(text: str) -> str:
    """What stands before the mark. Its space tells whether the template trims contents; then so do we."""
    at = text.rfind(_MARK)
    if at < 0:
        raise InvalidRequest(
            "`continue_final_message` needs a template that shows the last message as it is",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(_MARK + " ", at) else text[:at].rstrip()
