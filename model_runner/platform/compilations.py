"""Counts the kernels that triton compiles, and warns when one is compiled while serving.

A compilation takes tenths of a second to several seconds, during which no step runs.
"""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


class CompilationCounter:
    """Counts the kernel variants that triton compiles or reads from its cache. Installed once in a process."""

    def __init__(self) -> None:
        self.count = 0
        self.serving = False

    def install(self) -> CompilationCounter:
        """Adds this counter to triton's hook for compilations, if triton is installed, and returns it.

        A hook that was set before is still called.
        """
        try:
            from triton import knobs
        except ImportError:
            return self
        earlier = knobs.runtime.jit_post_compile_hook

        def hook(*args: Any, **kwargs: Any) -> Any:
            self.add(kwargs.get("repr", "a kernel"))
            return earlier(*args, **kwargs) if earlier is not None else None

        knobs.runtime.jit_post_compile_hook = hook
        return self

    def add(self, kernel: object) -> None:
        """Counts one compilation of `kernel`, and logs a warning if the runner is serving."""
        self.count += 1
        if self.serving:
            log.warning("a kernel was compiled while serving, which held up all requests: %.200s", kernel)
