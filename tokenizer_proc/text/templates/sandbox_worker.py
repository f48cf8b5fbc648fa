"""The process that renders adapters' chat templates, one job after the other, with bounded CPU time and memory.

    job on stdin --> rendered within CPU_SECONDS and MEMORY_BYTES --> reply on stdout

Jinja's sandbox keeps a template from reaching other objects, but bounds neither its loops nor its memory. The kernel's
resource limits do: they bound CPU time and memory, and keep the process from opening files and sockets. The module
`sandbox` starts the process, and a new one after the process has ended.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import struct
import time
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import msgspec

from engine.errors import EngineError
from engine.messages import ChatMessage
from tokenizer_proc.text.templates.chat_template import ChatTemplate

CPU_SECONDS = 2
MEMORY_BYTES = 256 << 20
MAX_CHARACTERS = 8 << 20
MAX_FRAME = 64 << 20
KEPT = 32
"""The number of compiled templates that are kept."""

LENGTH = struct.Struct(">I")


class RenderJob(msgspec.Struct, frozen=True, array_like=True):
    """A template and the messages to render. Without messages the template is only compiled."""

    source: str
    special_tokens: dict[str, str]
    messages: list[ChatMessage]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    kwargs: dict[str, str | int | float | bool | None] = {}


class RenderReply(msgspec.Struct, frozen=True, array_like=True):
    """The rendered text, or the reason why the job was refused and the body's field that caused it.

    `last` is True if the process has grown so much that this must be its last job.
    """

    text: str | None = None
    refused: str = ""
    param: str | None = None
    last: bool = False


def main() -> None:
    """Renders jobs from stdin until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for source in ("{{ strftime_now('%H') }}{{ messages | tojson }}", "{{ raise_exception('now all is imported') }}"):
        _render(RenderJob(source, {}, [ChatMessage("user", "a")]))
    _confine()
    small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    replies.write(LENGTH.pack(0))
    replies.flush()
    while (frame := read_frame(jobs)) is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime) + CPU_SECONDS, hard))
        reply = _render(msgspec.msgpack.decode(frame, type=RenderJob))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - small) * 1024
        encoded = _encoded(msgspec.structs.replace(reply, last=grown > MEMORY_BYTES // 2))
        replies.write(LENGTH.pack(len(encoded)) + encoded)
        replies.flush()


def read_frame(source: BinaryIO) -> bytes | None:
    """Reads and returns the next frame, or None at the end of the input."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    frame = source.read(length)
    return frame if len(frame) == length else None


def _render(job: RenderJob) -> RenderReply:
    try:
        template = _compiled(job.source, tuple(job.special_tokens.items()))
        if not job.messages:
            return RenderReply("")
        text = template.render(job.messages, job.add_generation_prompt, job.continue_final_message, **job.kwargs)
        if len(text) > MAX_CHARACTERS:
            return RenderReply(
                refused=f"the chat template made more than {MAX_CHARACTERS} characters", param="messages"
            )
        return RenderReply(text)
    except EngineError as error:
        return RenderReply(refused=error.message, param=error.param or "messages")
    except (MemoryError, RecursionError) as error:
        return RenderReply(
            refused=f"the chat template needs too much memory ({type(error).__name__})", param="messages"
        )


@lru_cache(maxsize=KEPT)
def _compiled(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens))


def _encoded(reply: RenderReply) -> bytes:
    try:
        return msgspec.msgpack.encode(reply)
    except (UnicodeEncodeError, MemoryError):
        return msgspec.msgpack.encode(RenderReply(refused="the chat template makes no valid text", param="messages"))


def _confine() -> None:
    """Sets the process's resource limits: no new files or sockets, no writing to disk, bounded memory."""
    time.localtime()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bounds = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + MEMORY_BYTES,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        resource.setrlimit(kind, (bound, bound))


if __name__ == "__main__":
    main()
