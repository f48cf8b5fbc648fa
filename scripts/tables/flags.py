"""The table of flags, from the parser of the command line."""

from __future__ import annotations

import argparse
import re

from engine.config.flags.parser import make_parser
from engine.config.flags.refused import NOT_YET_AVAILABLE, REFUSED
from tables.markdown import table

HEAD = ("flag", "value", "default", "what it does")
WITH_DEFAULT = re.compile(r"(?P<text>.*?) ?\((?P<default>[^()]*)\)")


def flags() -> str:
    """Returns a table for each group of flags, and the list of the flags that are refused."""
    parts = []
    for group in make_parser()._action_groups:
        rows = [row(action) for action in group._group_actions if is_shown(action)]
        if rows:
            parts += [f"## {str(group.title).capitalize().replace('Lora', 'LoRA')}", table(HEAD, rows)]
    refused = {**NOT_YET_AVAILABLE, **REFUSED}
    parts += [
        "## Flags of SGLang and vLLM that are refused",
        table(("flag", "why"), [(f"`{k}`", refused[k]) for k in refused]),
    ]
    return "\n\n".join(parts)


def is_shown(action: argparse.Action) -> bool:
    """Returns whether the table lists the action: it is a flag, its help is not suppressed, and it is not --help."""
    return bool(action.option_strings) and action.help != argparse.SUPPRESS and action.dest != "help"


def row(action: argparse.Action) -> tuple[str, str, str, str]:
    """Returns the names, values, default and text of one flag."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    return names, _values(action), _as_code(default_of(action)), _as_code(_split(action)["text"])


def default_of(action: argparse.Action) -> str:
    """Returns the default of a flag: the text in parentheses at the end of its help text."""
    return _split(action)["default"]


def _as_code(text: str) -> str:
    """Puts backticks around the flags and environment variables in `text`."""
    return re.sub(r"(?<!`)(--[a-z-]+[a-z](?:=[a-z]+)?|\b[A-Z]+(?:_[A-Z]+)+\b(?:=1)?)", r"`\1`", text)


def _split(action: argparse.Action) -> re.Match[str]:
    found = WITH_DEFAULT.fullmatch(str(action.help))
    if found is None:
        raise ValueError(f"{action.option_strings[0]}: its help must end with the default in parentheses")
    return found


def _values(action: argparse.Action) -> str:
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    if action.nargs == 0:
        return ""
    value = str(action.metavar or action.dest.upper())
    return f"{value} ..." if action.nargs == "+" else value
