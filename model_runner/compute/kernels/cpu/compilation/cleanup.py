"""How a builder ends before its time: with the compilers that it started, and leaving no files of its own.

Knows nothing of what is built.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path


class Leaving:
    """Called when the runner is gone, or on SIGTERM. `workshop`: where this process and its compilers write."""

    def __init__(self) -> None:
        self.workshop: Path | None = None
        self._begun = False
        signal.signal(signal.SIGTERM, self)

    def __call__(self, *_: object) -> None:
        """Ends the process group, if it is this process's own, then this process."""
        if self._begun:
            return
        self._begun = True
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGTERM)
        if self.workshop is not None:
            shutil.rmtree(self.workshop, ignore_errors=True)
        os._exit(0)
