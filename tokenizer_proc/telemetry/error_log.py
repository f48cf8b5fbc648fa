"""The fields of an error that the log shows: kind, code, field and message, without texts from the client."""

from __future__ import annotations

import re

from engine.errors import EngineError

_TEXTS = re.compile(r"(sampling_params\S*\.)?(messages|prompt|text|input_ids|tokens|stop|chat_template_kwargs)\b")


def error_fields(error: EngineError) -> dict[str, object]:
    """Returns the fields to pass to `logs.pairs`. A message about a client's text is cut before it quotes the text."""
    message = error.message
    if _TEXTS.match(error.param or ""):
        message = re.split(r": | = ", message, maxsplit=1)[0]
    return {"kind": error.kind, "code": error.code, "param": error.param, "message": message}
