"""Counts the kernels that triton compiles, and warns when one is compiled while serving.

A compilation takes from tenths of a second to seconds, in which no step runs. Does not know what the kernels do.
"""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


class CompilationCounter:
    """Installed once a process; `count` grows with each kernel variant, compiled or read from triton's cache."""

    def __init__(self) -> None:
        self.count = 0
        self.serving = False

    def install(self) -> CompilationCounter:
        """Adds itself to triton's hook for compilations, if triton is installed; an earlier hook is still called."""
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
        """Counts one compilation."""
        self.count += 1
        if self.serving:
            log.warning("a kernel was compiled while serving, which held up all requests: %.200s", kernel)
