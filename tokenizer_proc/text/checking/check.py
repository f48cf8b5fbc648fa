"""Has a tokenizer.json parsed by a process of its own, which is ended if that takes too much time or memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import msgspec

from engine.errors import ConfigError, StorageFailed
from engine.ipc import DECODE_ERRORS
from tokenizer_proc.text.checking.check_worker import CPU_SECONDS, MEMORY_BYTES, CheckedTokenizer
from tokenizer_proc.text.templates.sandbox import KEPT_VARIABLES

WALL_SECONDS = 120.0
"""The bound on the wall time of a check, on a busy machine."""

_TWO_AT_ONCE = threading.Semaphore(2)


def checked(raw: bytes, path: object) -> CheckedTokenizer:
    """Returns what is in `raw`, the content of the tokenizer.json at `path`. Blocks the calling thread.

    Raises ConfigError if the file cannot be used, or takes too much time or memory, and StorageFailed if no process can
    be started.
    """
    command = [sys.executable, "-P", "-m", "tokenizer_proc.text.checking.check_worker"]
    kept = {name: value for name, value in os.environ.items() if name in KEPT_VARIABLES}
    with _TWO_AT_ONCE:
        try:
            ended = subprocess.run(
                command,
                input=raw,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=kept | {"PYTHONSAFEPATH": "1"},
                timeout=WALL_SECONDS,
                check=True,
            )
            found = msgspec.msgpack.decode(ended.stdout, type=CheckedTokenizer)
        except (subprocess.SubprocessError, *DECODE_ERRORS) as error:
            raise ConfigError(
                f"{path} cannot be read: parsing it was stopped, as it may take {CPU_SECONDS} seconds of computing and"
                f" {MEMORY_BYTES >> 20} MiB of memory"
            ) from error
        except OSError as error:
            raise StorageFailed(f"{path} cannot be checked now ({error.strerror}): try again later") from error
    if found.refused:
        raise ConfigError(f"{path} cannot be read: {found.refused[:500]}")
    return found
