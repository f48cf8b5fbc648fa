"""Renders adapters' chat templates in a separate process, which is killed if a job takes too much time or memory.

    prompt() --> one job at a time, one waiting job per template --> renderer --> text
                                        killed: InvalidRequest, and a new process for the next job

Templates take turns, so that a slow one delays another by one job at most. The model's own template is not rendered
here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import msgspec

from engine.errors import InternalError, InvalidRequest
from engine.ipc import DECODE_ERRORS
from engine.messages import ChatMessage
from tokenizer_proc.text.templates.chat_template import ChatRenderer, Value, check_messages
from tokenizer_proc.text.templates.sandbox_worker import (
    CPU_SECONDS,
    LENGTH,
    MAX_FRAME,
    MEMORY_BYTES,
    RenderJob,
    RenderReply,
)

START_SECONDS = 60.0
WALL_SECONDS = 30.0
"""The bound on a job's wall time, beside CPU_SECONDS, for jobs that wait instead of computing.

It is long enough for a busy machine.
"""

TOO_MUCH = (
    f"the adapter's chat template was stopped: it may take {CPU_SECONDS} seconds of computing and"
    f" {MEMORY_BYTES >> 20} MiB of memory"
)


KEPT_VARIABLES = frozenset({"PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL"})


class _RendererGone(Exception):
    """The renderer process ended, or did not reply in time."""


class Sandbox:
    """One renderer process, started by the first job. `close` ends the process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._turn = asyncio.Lock()
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat templates")

    @property
    def process_id(self) -> int | None:
        """The id of the current renderer process, or None if there is none."""
        return None if self._process is None else self._process.pid

    async def render(self, job: RenderJob) -> str:
        """Renders `job` and returns the text.

        Raises InvalidRequest with the template's own message, or if the job takes too much time or memory.
        """
        async with self._turn:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.render_in_thread, job)

    def render_in_thread(self, job: RenderJob) -> str:
        """Does the same as `render`, but blocks the calling thread."""
        try:
            frame = msgspec.msgpack.encode(job)
        except (OverflowError, UnicodeEncodeError, RecursionError) as error:  # e.g. a number of more than 64 bits
            raise InvalidRequest(f"the messages cannot be sent to the renderer: {error}", param="messages") from error
        if len(frame) > MAX_FRAME:
            raise InvalidRequest(f"the messages are more than {MAX_FRAME >> 20} MiB", param="messages")
        with self._lock:
            reply = self._exchange(frame)
        if reply.text is None:
            raise InvalidRequest(reply.refused, param=reply.param)
        return reply.text

    def close(self) -> None:
        """Ends the renderer process. The next job starts a new one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _exchange(self, frame: bytes) -> RenderReply:
        process = self._started()
        deadline = time.monotonic() + WALL_SECONDS
        try:
            _write(process, LENGTH.pack(len(frame)) + frame, deadline)
            reply = msgspec.msgpack.decode(_read(process, deadline), type=RenderReply)
        except _RendererGone as error:
            self.close()
            raise InvalidRequest(TOO_MUCH, param="messages", code="chat_template_stopped") from error
        except DECODE_ERRORS as error:
            self.close()
            raise InternalError(f"the reply of the chat template process cannot be read ({error})") from error
        if reply.last:
            self.close()
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tokenizer_proc.text.templates.sandbox_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name in KEPT_VARIABLES} | {"PYTHONSAFEPATH": "1"},
        )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        try:
            _read(self._process, time.monotonic() + START_SECONDS)
        except _RendererGone as error:
            self.close()
            raise InternalError("the chat template process does not start") from error
        return self._process


class SandboxedTemplate(ChatRenderer):
    """An adapter's chat template, rendered in `sandbox`. Raises InvalidRequest if it cannot be compiled."""

    source: str

    def __init__(self, sandbox: Sandbox, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._sandbox = sandbox
        self._special_tokens = dict(special_tokens)
        self._turn = asyncio.Lock()
        sandbox.render_in_thread(RenderJob(source, self._special_tokens, []))

    async def prompt(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Value,
    ) -> str:
        """Returns the prompt text.

        Raises InvalidRequest with the template's own message, or if rendering takes too much time or memory.
        """
        check_messages(messages, add_generation_prompt, continue_final_message)
        job = RenderJob(
            self.source, self._special_tokens, list(messages), add_generation_prompt, continue_final_message, kwargs
        )
        async with self._turn:
            return await self._sandbox.render(job)


def _write(process: subprocess.Popen[bytes], data: bytes, deadline: float) -> None:
    assert process.stdin is not None
    descriptor, view = process.stdin.fileno(), memoryview(data)
    while view:
        _wait(descriptor, select.POLLOUT, deadline)
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            continue
        except OSError as error:
            raise _RendererGone from error


def _read(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Reads the next frame from the process. Raises _RendererGone if it does not arrive before `deadline`."""
    (length,) = LENGTH.unpack(_read_exactly(process, LENGTH.size, deadline))
    if length > MAX_FRAME:
        raise _RendererGone
    return _read_exactly(process, length, deadline)


def _read_exactly(process: subprocess.Popen[bytes], count: int, deadline: float) -> bytes:
    assert process.stdout is not None
    parts, left = [], count
    while left:
        _wait(process.stdout.fileno(), select.POLLIN, deadline)
        try:
            part = os.read(process.stdout.fileno(), min(left, 1 << 20))
        except BlockingIOError:
            continue
        if not part:
            raise _RendererGone
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise _RendererGone
