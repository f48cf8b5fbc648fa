"""What the log says of a refusal: its kind, code and field, and its words as far as they are ours. Knows no door."""

from __future__ import annotations

import re

from engine.errors import EngineError

_TEXTS = re.compile(r"(sampling_params\S*\.)?(messages|prompt|text|input_ids|tokens|stop|chat_template_kwargs)\b")


def error_fields(error: EngineError) -> dict[str, object]:
    """For `logs.pairs`. A complaint about a text ends where it would quote from it: that is for the client alone."""
    message = error.message
    if _TEXTS.match(error.param or ""):
        message = re.split(r": | = ", message, maxsplit=1)[0]
    return {"kind": error.kind, "code": error.code, "param": error.param, "message": message}
