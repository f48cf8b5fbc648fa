"""A chat template: renders messages to prompt text.

The text already contains the special tokens, so it is encoded without adding any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from engine.errors import ConfigError, InvalidRequest
from engine.messages import ChatMessage
from tokenizer_proc.text import files
from tokenizer_proc.text.templates.environment import template_environment
from tokenizer_proc.text.templates.template_files import given_template, template_of

Value = str | int | float | bool | None

_MARK = "\u2063\u2063here the answer goes on\u2063\u2063"  # the text is cut here to continue the last message


class ChatRenderer(ABC):
    """Renders chat messages to prompts, in this process or in another one."""

    source: str | None

    @abstractmethod
    async def prompt(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Value,
    ) -> str:
        """Returns the prompt text. Raises InvalidRequest if the template cannot render or refuses the messages."""


def check_messages(messages: Sequence[ChatMessage], add_generation_prompt: bool, continue_final_message: bool) -> None:
    """Raises InvalidRequest for messages that no template can render."""
    if not messages:
        raise InvalidRequest("`messages` is empty", param="messages")
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest(
            "`continue_final_message` and `add_generation_prompt` contradict each other: set one of them",
            param="continue_final_message",
        )


class ChatTemplate(ChatRenderer):
    """A chat template with the text `source`. With None the model has no template, and every chat is refused."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._template: jinja2.Template | None = None
        if source is not None:
            try:
                self._template = template_environment().from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise ConfigError(f"the chat template is not valid jinja: line {error.lineno}: {error}") from error
            except Exception as error:  # deep nesting and huge numbers raise errors other than TemplateSyntaxError
                raise ConfigError(f"the chat template cannot be compiled: {_reason(error)}") from error

    @classmethod
    def load(
        cls, directory: str | Path, given: str | None = None, special_tokens: Mapping[str, str] | None = None
    ) -> ChatTemplate:
        """Returns the template `given` (a file's name or the template's text), or else the one in `directory`.

        `directory` is the tokenizer's.
        """
        if given is not None:
            return cls(given_template(given), special_tokens)
        with files.open_directory(directory) as opened:
            source = None if opened is None else template_of(opened)
        return cls(source, special_tokens)

    async def prompt(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Value,
    ) -> str:
        """Returns the result of `render`: the model's own template is trusted, so it is rendered in this process."""
        return self.render(messages, add_generation_prompt, continue_final_message, **kwargs)

    def render(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Value,
    ) -> str:
        """Returns the prompt text. Raises InvalidRequest with the template's own message if it refuses the messages."""
        check_messages(messages, add_generation_prompt, continue_final_message)
        turns: list[dict[str, Any]] = [msgspec.to_builtins(self._fitted(message)) for message in messages]
        if not continue_final_message:
            return self._render(turns, add_generation_prompt, kwargs)
        turns[-1]["content"] += _MARK + " "
        return _cut(self._render(turns, add_generation_prompt, kwargs))

    def _fitted(self, message: ChatMessage) -> ChatMessage:
        """Returns the message as the template takes it: where it has no role `developer`, that role is `system`.

        Raises InvalidRequest for tool calls that the template would leave out.
        """
        source = self.source or ""
        if message.tool_calls and "tool_calls" not in source:
            raise InvalidRequest(
                "this model's chat template has no tool calls: leave `tool_calls` out of the messages", param="messages"
            )
        if message.role == "developer" and "developer" not in source:
            return msgspec.structs.replace(message, role="system")
        return message

    def _render(self, turns: list[dict[str, Any]], add_generation_prompt: bool, kwargs: dict[str, Any]) -> str:
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
        except Exception as error:  # a template's own code may raise anything
            raise InvalidRequest(f"the chat template refuses this: {_reason(error)}", param="messages") from error


def _reason(error: Exception) -> str:
    """Returns the error's message, cut to 500 characters. The error's type comes first, unless it is jinja's own."""
    text = str(error)[:500]
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


def _cut(text: str) -> str:
    """Returns the text before the mark.

    The mark was followed by a space. If the space is gone, the template trims contents, so the text is trimmed too.
    """
    at = text.rfind(_MARK)
    if at < 0:
        raise InvalidRequest(
            "`continue_final_message` needs a template that shows the last message as it is",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(_MARK + " ", at) else text[:at].rstrip()
