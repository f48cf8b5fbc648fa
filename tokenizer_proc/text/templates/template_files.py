"""Reads the text of a chat template from the files of a directory, or from --chat-template, without parsing it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.directory import Directory
from engine.errors import ConfigError
from engine.ipc import DECODE_ERRORS
from tokenizer_proc.text import files

TEMPLATE_NAME = "chat_template.jinja"


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TemplateField(msgspec.Struct):
    """The `chat_template` field of tokenizer_config.json, or of chat_template.json in older checkpoints."""

    chat_template: str | list[_NamedTemplate] | None = None


def _from_json(directory: Directory, name: str) -> str | None:
    raw, path = files.read(directory, name, files.MAX_CONFIG), directory.path / name
    if raw is None:
        return None
    try:
        template = msgspec.json.decode(raw, type=_TemplateField).chat_template
    except DECODE_ERRORS as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(template, list):
        return template
    named = {each.name: each.template for each in template}
    if "default" not in named:
        raise ConfigError(f"{path} names the chat templates {sorted(named)} but no `default`: use --chat-template")
    return named["default"]


def given_template(template: str) -> str:
    """Returns the template that --chat-template gives, which is a file's name or the template itself.

    Raises ConfigError if it is neither, or if the file cannot be read.
    """
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


def template_of(directory: Directory) -> str | None:
    """Returns the text of the chat template in `directory`, or None. Raises ConfigError for unreadable files."""
    path = directory.path / TEMPLATE_NAME
    raw = files.read(directory, TEMPLATE_NAME, files.MAX_TEMPLATE)
    if raw is not None:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (template := _from_json(directory, name)) is not None:
            return template
    return None
