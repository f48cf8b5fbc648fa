"""A child process of a runner: started by module name, given its config, ended.

    runner                                    child
      | -- config, one JSON line on stdin ----->|   stdin then stays open: its end means the runner is gone
      | == a file descriptor of both =========> |   for their messages, which the caller reads and writes

Does not know what the child does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys

import msgspec

PIPE_BYTES = 1 << 20
"""The size of the stdin pipe: it holds the config of a deep model, so writing does not wait for the child to read."""


class ChildProcess:
    """`python -P -m module`, on one thread and without a GPU; the caller must end it. Raises OSError."""

    def __init__(self, module: str, config: msgspec.Struct, descriptor: int, *, leads_group: bool = False) -> None:
        """The child inherits `descriptor`. `leads_group`: `kill` also kills all processes that the child started."""
        self._leads_group = leads_group
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            process_group=0 if leads_group else None,
            env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self._process.stdin is not None
        self._lifeline = self._process.stdin
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._lifeline, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        with contextlib.suppress(OSError):  # it died already: the end of the descriptor tells the caller
            self._lifeline.write(msgspec.json.encode(config) + b"\n")
            self._lifeline.flush()

    @property
    def pid(self) -> int:
        """The child's process id, which is also that of its group if it leads one."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the child has not ended yet."""
        return self._process.poll() is None

    @property
    def exit_text(self) -> str:
        """How the child ended, in words."""
        code = self._process.returncode
        if code is None:
            return "does not end"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def wait(self, seconds: float | None = None) -> None:
        """Waits until the child has ended, but at most so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def terminate(self) -> None:
        """Sends SIGTERM, so that the child can clean up first."""
        self._process.terminate()

    def kill(self, seconds: float) -> None:
        """Kills the child if it runs. Waits at most `seconds` for its end, since it may hang in a system call."""
        if self.is_running:
            with contextlib.suppress(OSError):
                (os.killpg if self._leads_group else os.kill)(self.pid, signal.SIGKILL)
        self.wait(seconds)
        with contextlib.suppress(OSError):
            self._lifeline.close()
