"""A child of a runner as the runner sees it: started by name, handed its config, ended. What it says is not heard here.

    runner                                    child
      | -- config, one JSON line on stdin ----->|   stdin then stays open: its end means the runner is gone
      | == a descriptor that both hold ========>|   what they say to each other, whoever starts it knows how

Knows nothing of what the child does.
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
"""Room for the config of a deep model, so that writing it does not wait for the child to read."""


class ChildProcess:
    """`python -P -m module`, on one thread and without a GPU. Whoever starts it ends it. Raises OSError."""

    def __init__(self, module: str, config: msgspec.Struct, descriptor: int, *, leads: bool = False) -> None:
        """`descriptor` is handed on. One that `leads` a process group is killed with everything it started."""
        self._leads = leads
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            process_group=0 if leads else None,
            env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self._process.stdin is not None
        self._lifeline = self._process.stdin
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._lifeline, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        with contextlib.suppress(OSError):  # it died already: the end of what both hold says so
            self._lifeline.write(msgspec.json.encode(config) + b"\n")
            self._lifeline.flush()

    @property
    def pid(self) -> int:
        """Its process id, and that of its group where it leads one."""
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        code = self._process.returncode
        if code is None:
            return "does not end"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended, or for so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def ask_to_end(self) -> None:
        """SIGTERM: it may put things away first."""
        self._process.terminate()

    def kill(self, seconds: float) -> None:
        """Kills it if it runs, and waits for so long; one that hangs in the kernel is left to it."""
        if self.runs:
            with contextlib.suppress(OSError):
                (os.killpg if self._leads else os.kill)(self.pid, signal.SIGKILL)
        self.wait(seconds)
        with contextlib.suppress(OSError):
            self._lifeline.close()
