"""PEFT's adapter_config.json as a JSON object, and the errors that name one of its options."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.adapter_layouts.foreign import describe
from engine.adapter_layouts.nested import CONFIG_NAME as CONFIG_NAME
from engine.directory import Directory, FileMissing
from engine.errors import AdapterError
from model_runner.lora.files.quoted import quoted_value

MAX_CONFIG_BYTES = 4 << 20


def read_options(directory: Directory) -> dict[str, Any]:
    """Returns the options in the config of the adapter.

    Raises AdapterError naming the file, or what the directory is if it has no config.
    """
    try:
        return msgspec.json.decode(directory.read(CONFIG_NAME, MAX_CONFIG_BYTES), type=dict[str, Any])
    except FileMissing as error:
        raise AdapterError(describe(directory)) from error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterError(f"{CONFIG_NAME}: {error}") from error


def unsupported(option: str, value: object, reason: str) -> AdapterError:
    """Returns the error for an option whose value is not served."""
    return AdapterError(f"{CONFIG_NAME}: {option}={quoted_value(value)} is not supported yet ({reason})")
