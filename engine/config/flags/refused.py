"""Flags of SGLang and vLLM that are known and not available: each ends the launch with a line that says why."""

from __future__ import annotations

import argparse

from engine.errors import ConfigError

NOT_YET_AVAILABLE = {
    "--revision": "write org/name@revision instead",
    "--fully-sharded-loras": "tensor parallelism is not available yet",
}
REFUSED = {
    "--trust-remote-code": "no code from a model or adapter directory is ever run",
    "--quantization": "quantized bases are not served yet",
}


class Refuse(argparse.Action):
    """A known flag that is not available; the error says why."""

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        flag = str(option_string)
        if flag in REFUSED:
            raise ConfigError(f"{flag} is refused: {REFUSED[flag]}")
        raise ConfigError(f"{flag} is not available yet: {NOT_YET_AVAILABLE[flag]}")
