"""A builder child as its runner sees it: started by name, heard, ended with all that it started.

Knows nothing of what becomes of a library.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import weakref

import msgspec
from msgspec.structs import replace

from model_runner.compiled.messages import Order, Report

PIPE_BYTES = 1 << 20
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
            self._process = _start(replace(order, pipe=theirs))
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._end = weakref.finalize(self, _end, self._process, ours)

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self._process.pid

    def hear(self) -> Report | None:
        """The next report, if it is there. Never waits. Raises Gone when the child has ended after the last one."""
        if b"\n" not in self._heard:
            try:
                piece = os.read(self._pipe, 65536)
            except BlockingIOError:
                return None
            if not piece:
                self._silent = True
                if self._process.poll() is None:
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
            self._process.wait()
        elif b"\n" not in self._heard:
            select.select([self._pipe], [], [])

    def end(self) -> str:
        """Ends it and its compilers, if they run; says how it ended."""
        self._end()
        code = self._process.returncode
        if code is None:
            return "does not end"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"


def _start(order: Order) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "model_runner.compiled"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=(order.pipe,),
        process_group=0,  # so that its compilers end with it
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with contextlib.suppress(OSError):  # it died already: the end of the pipe says so
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        process.stdin.flush()
    return process


def _end(process: subprocess.Popen[bytes], pipe: int) -> None:
    try:
        process.terminate()  # it puts things away first
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    os.close(pipe)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
