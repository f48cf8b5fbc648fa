"""The process that parses one tokenizer.json from its stdin, with bounded CPU time and memory, and describes it.

Parsing holds the interpreter's lock for as long as it takes: a second for a large file. The module `check` starts this
process, which ends after one file.
"""

from __future__ import annotations

import hashlib
import os
import resource
from pathlib import Path

import msgspec
import tokenizers

from engine.ipc import DECODE_ERRORS
from tokenizer_proc.text.tokenizer import is_from_library
from tokenizer_proc.text.tokenizer_json import TokenizerSections

CPU_SECONDS = 30
MEMORY_BYTES = 3 << 30
NICENESS = 10


class CheckedTokenizer(msgspec.Struct, frozen=True):
    """What is in a tokenizer.json, as the library writes it, so that files that differ in their formatting are equal.

    `content` and `model` are hashes of the whole and of its model, whose JSON has `model_bytes`; `small` is the JSON of
    all other parts. `refused` is why the file cannot be used, or empty.
    """

    refused: str = ""
    content: bytes = b""
    model: bytes = b""
    model_bytes: int = 0
    small: bytes = b""


def described(raw: bytes) -> CheckedTokenizer:
    """Parses `raw`, the content of a tokenizer.json."""
    try:
        TokenizerSections.read(raw)
        backend = tokenizers.Tokenizer.from_str(raw.decode())
        backend.no_truncation()
        backend.no_padding()
        backend.decode(backend.encode("a").ids)  # raises if parts of it refer to missing tokens
        written = backend.to_str().encode()
        sections = TokenizerSections.read(written)
    except DECODE_ERRORS as error:
        return CheckedTokenizer(refused=str(error))
    except BaseException as error:
        if not is_from_library(error):
            raise
        return CheckedTokenizer(refused=str(error))
    model = bytes(sections.model)
    small = msgspec.json.encode(msgspec.structs.replace(sections, model=msgspec.Raw(b"null")))
    return CheckedTokenizer(
        content=hashlib.sha256(written).digest(),
        model=hashlib.sha256(model).digest(),
        model_bytes=len(model),
        small=small,
    )


def main() -> None:
    """Describes the file on stdin on stdout."""
    source, answer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.nice(NICENESS)
    _confine()
    answer.write(msgspec.msgpack.encode(described(source.read())))
    answer.flush()
    os._exit(0)  # freeing a million small objects first would take long


def _confine() -> None:
    """Sets the process's resource limits: no new files or sockets, no writing to disk, bounded time and memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bounds = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + MEMORY_BYTES,
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        resource.setrlimit(kind, (bound, bound))


if __name__ == "__main__":
    main()
