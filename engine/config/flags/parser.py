"""Parses the command line into ServerArgs. Flags have SGLang's names, with vLLM's as aliases, so that a command line
for either engine works unchanged.

A flag of SGLang or vLLM that is not available ends the launch with a one-line message, like any other invalid flag.
The module imports no large library, so that --help is quick.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from engine.config.flags.lora import add_lora_flags, add_runtime_flags
from engine.config.flags.model import add_model_flags
from engine.config.flags.refused import NOT_YET_AVAILABLE, REFUSED, Refuse
from engine.config.flags.server import add_server_flags
from engine.config.server_args import ServerArgs
from engine.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(argv: Sequence[str]) -> ServerArgs:
    """Parses a command line (without the program's name). Raises ConfigError with a one-line message."""
    for argument in (*argv, os.environ.get("CHORUS_ADMIN_API_KEY", "")):
        if not _is_text(argument):
            raise ConfigError(
                "a flag, a path or CHORUS_ADMIN_API_KEY has bytes that are no text in this locale's encoding"
            )
    fields = vars(make_parser().parse_args(argv))
    positional = fields.pop("model")
    if positional is not None and fields.get("model_path") not in (None, positional):
        raise ConfigError(f"the model is given twice: {positional} and --model-path {fields['model_path']}")
    if positional is not None:
        fields["model_path"] = positional
    return ServerArgs(**{**_from_environment(), **fields})


def _is_text(argument: str) -> bool:
    """Returns whether Python could decode an argument; the bytes that it could not are surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def _from_environment() -> dict[str, object]:
    """Returns the fields set by environment variables: the admin key, which a process list must not show, and vLLM's
    switch for loading adapters at run time.
    """
    fields: dict[str, object] = {}
    if key := os.environ.get("CHORUS_ADMIN_API_KEY"):
        fields["admin_api_key"] = key
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() in ("1", "true"):
        fields["allow_runtime_lora_updating"] = True
    return fields


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line. Each help text ends with the flag's default in parentheses."""
    parser = _Parser(
        prog="python -m engine.launch",
        description="Chorus: serve one base model and many LoRA adapters. Without a model it serves a small demo.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    add_server_flags(parser)
    add_model_flags(parser)
    add_lora_flags(parser)
    add_runtime_flags(parser)
    for flag in (*NOT_YET_AVAILABLE, *REFUSED):
        parser.add_argument(flag, action=Refuse, nargs="*", help=argparse.SUPPRESS)
    return parser
