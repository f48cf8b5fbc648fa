"""The runner's handle on its builder process: starts it, receives its results, stops it and its compilers.

Does not load libraries.
"""

from __future__ import annotations

import os
import select
import weakref

import msgspec
from msgspec.structs import replace

from model_runner.compute.kernels.cpu.compilation.messages import BuildOrder, BuildResult
from model_runner.platform.child_process import ChildProcess

STOP_SECONDS = 1.0
"""The time that a builder has to end after the end of its stdin before it is killed."""

_RESULT = msgspec.json.Decoder(BuildResult)


class BuilderGone(Exception):
    """Raised when the builder has ended; the message says how it ended."""


class Builder:
    """A running builder process; killed when this object is garbage collected. Raises OSError if it cannot start."""

    def __init__(self, order: BuildOrder) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        self._pipe = read_end
        self._received = b""
        self._pipe_closed = False
        try:
            self._child = ChildProcess(
                "model_runner.compute.kernels.cpu.compilation",
                replace(order, pipe=write_end),
                write_end,
                leads_group=True,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._stop = weakref.finalize(self, _stop, self._child, read_end)

    @property
    def pid(self) -> int:
        """The builder's process id, which is also that of its process group."""
        return self._child.pid

    def receive(self) -> BuildResult | None:
        """Returns the next result, or None if there is none yet. Does not wait.

        Raises BuilderGone when the builder has ended and all its results have been received.
        """
        if b"\n" not in self._received:
            try:
                data = os.read(self._pipe, 65536)
            except BlockingIOError:
                return None
            if not data:
                self._pipe_closed = True
                if self._child.is_running:
                    return None
                raise BuilderGone(self.stop())
            self._received += data
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        try:
            return _RESULT.decode(line)
        except msgspec.MsgspecError as error:
            self.stop()
            raise BuilderGone(f"sent a malformed result ({error})") from error

    def wait(self) -> None:
        """Waits until `receive` has a result to return, or BuilderGone to raise."""
        if self._pipe_closed:
            self._child.wait()
        elif b"\n" not in self._received:
            select.select([self._pipe], [], [])

    def stop(self) -> str:
        """Ends the builder and its compilers if they run. Returns a phrase that says how the builder ended."""
        self._stop()
        return self._child.exit_text


def _stop(child: ChildProcess, pipe: int) -> None:
    child.stop()  # the builder then removes its temporary files
    child.wait(STOP_SECONDS)
    child.kill(STOP_SECONDS)
    os.close(pipe)
