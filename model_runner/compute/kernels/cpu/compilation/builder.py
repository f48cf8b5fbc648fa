"""A builder child as its runner sees it: started by name, heard, ended with all that it started.

Knows nothing of what becomes of a library.
"""

from __future__ import annotations

import os
import select
import weakref

import msgspec
from msgspec.structs import replace

from model_runner.compute.kernels.cpu.compilation.messages import Order, Report
from model_runner.platform.child_process import ChildProcess

END_SECONDS = 1.0
"""How long a child that was asked to end is waited for, until it is killed."""

_REPORT = msgspec.json.Decoder(Report)


class Gone(Exception):
    """The builder has ended; `str` says how."""


class Builder:
    """A running child. Whoever starts it ends it; one that is forgotten is killed. Raises OSError."""

    def __init__(self, order: Order) -> None:
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        self._pipe = ours
        self._heard = b""
        self._silent = False
        try:
            self._child = ChildProcess(
                "model_runner.compute.kernels.cpu.compilation", replace(order, pipe=theirs), theirs, leads=True
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._end = weakref.finalize(self, _end, self._child, ours)

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self._child.pid

    def hear(self) -> Report | None:
        """The next report, if it is there. Never waits. Raises Gone when the child has ended after the last one."""
        if b"\n" not in self._heard:
            try:
                piece = os.read(self._pipe, 65536)
            except BlockingIOError:
                return None
            if not piece:
                self._silent = True
                if self._child.runs:
                    return None
                raise Gone(self.end())
            self._heard += piece
        line, found, rest = self._heard.partition(b"\n")
        if not found:
            return None
        self._heard = rest
        try:
            return _REPORT.decode(line)
        except msgspec.MsgspecError as error:
            self.end()
            raise Gone(f"made no sense ({error})") from error

    def wait(self) -> None:
        """Until there is something to hear."""
        if self._silent:
            self._child.wait()
        elif b"\n" not in self._heard:
            select.select([self._pipe], [], [])

    def end(self) -> str:
        """Ends it and its compilers, if they run; says how it ended."""
        self._end()
        return self._child.ending


def _end(child: ChildProcess, pipe: int) -> None:
    child.ask_to_end()  # it puts things away first
    child.wait(END_SECONDS)
    child.kill(END_SECONDS)
    os.close(pipe)
