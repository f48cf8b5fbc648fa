"""Ends a builder process early, together with the compilers that it started and without leaving temporary files.

Does not depend on what is built.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from engine.processes.child import leave


class ShutdownHandler:
    """A handler that ends the process; called when the runner asks for it or has ended.

    `build_directory`: the directory that this process and its compilers write to; removed on shutdown.
    """

    def __init__(self) -> None:
        self.build_directory: Path | None = None
        self._started = False

    def __call__(self) -> None:
        """Ends the compilers (the process group, if this process leads it), then exits this process."""
        if self._started:
            return
        self._started = True
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGTERM)  # which this process ignores
        if self.build_directory is not None:
            shutil.rmtree(self.build_directory, ignore_errors=True)
        leave()
