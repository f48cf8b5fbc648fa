"""What the log shows of an error: kind, code, field and message, without a client's texts. Knows no server."""

from __future__ import annotations

import re

from engine.errors import EngineError

_TEXTS = re.compile(r"(sampling_params\S*\.)?(messages|prompt|text|input_ids|tokens|stop|chat_template_kwargs)\b")


def error_fields(error: EngineError) -> dict[str, object]:
    """The fields for `logs.pairs`. A message about a text is cut where it would quote the text."""
    message = error.message
    if _TEXTS.match(error.param or ""):
        message = re.split(r": | = ", message, maxsplit=1)[0]
    return {"kind": error.kind, "code": error.code, "param": error.param, "message": message}
