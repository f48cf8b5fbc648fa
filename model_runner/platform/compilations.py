"""Counts the kernels that triton compiles, and says so when one is compiled while serving.

A compile takes from tenths of a second to seconds, and everyone waits for it. Knows nothing of what the kernels do.
"""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


class Compilations:
    """Installed once a process; `count` grows with every kernel variant, compiled or read from triton's cache."""

    def __init__(self) -> None:
        self.count = 0
        self.serving = False

    def install(self) -> Compilations:
        """Begins to listen, beside whoever does already. Without triton there is nothing to hear."""
        try:
            from triton import knobs
        except ImportError:
            return self
        before = knobs.runtime.jit_post_compile_hook

        def hook(*args: Any, **kwargs: Any) -> Any:
            self.hear(kwargs.get("repr", "a kernel"))
            return before(*args, **kwargs) if before is not None else None

        knobs.runtime.jit_post_compile_hook = hook
        return self

    def hear(self, kernel: object) -> None:
        """One more."""
        self.count += 1
        if self.serving:
            log.warning("compiled while serving, everyone waited: %.200s", kernel)
