"""Ends a builder process early, together with the compilers that it started and without leaving temporary files.

Does not know what is built.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path


class ShutdownHandler:
    """Called on SIGTERM, and when the runner is gone.

    `build_directory`: where this process and its compilers write; removed on shutdown.
    """

    def __init__(self) -> None:
        self.build_directory: Path | None = None
        self._started = False
        signal.signal(signal.SIGTERM, self)

    def __call__(self, *_: object) -> None:
        """Ends the process group if this process leads it, then this process."""
        if self._started:
            return
        self._started = True
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGTERM)
        if self.build_directory is not None:
            shutil.rmtree(self.build_directory, ignore_errors=True)
        os._exit(0)
