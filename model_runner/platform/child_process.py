"""A child process of a runner: starts it by module name, sends it its config and ends it.

    runner                                    child
      | -- config, one JSON line on stdin ----->|   stdin stays open, and ends when the runner has ended
      | == a shared file descriptor ==========> |   carries their messages, which the caller reads and writes

Does not depend on what the child does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading

import msgspec

PIPE_BYTES = 1 << 20
"""The size of the stdin pipe. The config of a deep model fits, so writing does not wait for the child to read."""


class ChildProcess:
    """A process `python -P -m module` with one OpenMP thread and no GPU. The caller must end it.

    Raises OSError if the process cannot be started.
    """

    def __init__(self, module: str, config: msgspec.Struct, descriptor: int, *, leads_group: bool = False) -> None:
        """Starts the process, which inherits `descriptor`.

        With `leads_group`, `kill` also kills all processes that the child started.
        """
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
        with contextlib.suppress(OSError):  # the child died already: the caller sees the end of `descriptor`
            self._lifeline.write(msgspec.json.encode(config) + b"\n")
            self._lifeline.flush()

    @property
    def pid(self) -> int:
        """The child's process id; also the id of its process group if it leads one."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the child has not ended yet."""
        return self._process.poll() is None

    @property
    def exit_text(self) -> str:
        """A phrase for messages that says how the child ended, such as "ended with status 1"."""
        code = self._process.returncode
        if code is None:
            return "does not end"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def wait(self, seconds: float | None = None) -> None:
        """Waits until the child has ended, at most `seconds` (None: without limit)."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def stop(self) -> None:
        """Closes the child's stdin, on which it can clean up before it ends."""
        with contextlib.suppress(OSError):
            self._lifeline.close()

    def kill(self, seconds: float) -> None:
        """Kills the child if it is running. Waits at most `seconds` for it to end: it may hang in a system call."""
        if self.is_running:
            with contextlib.suppress(OSError):
                (os.killpg if self._leads_group else os.kill)(self.pid, signal.SIGKILL)
        self.wait(seconds)
        self.stop()
        if self.is_running:  # it hangs in the kernel: a thread waits for it, so that it does not stay a zombie
            with contextlib.suppress(RuntimeError):  # no thread can be started: this process ends, or has too many
                threading.Thread(target=self._process.wait, name="wait", daemon=True).start()
