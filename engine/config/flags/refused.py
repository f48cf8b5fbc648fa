"""Flags of SGLang and vLLM that are recognised but not available: each ends the launch with a one-line reason."""

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
    """The argparse action of a flag that is not available: raises an error that says why."""

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        flag = str(option_string)
        if flag in REFUSED:
            raise ConfigError(f"{flag} is refused: {REFUSED[flag]}")
        raise ConfigError(f"{flag} is not available yet: {NOT_YET_AVAILABLE[flag]}")
