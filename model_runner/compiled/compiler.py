"""One function to one shared library, by the machine's C++ compiler: from torch's Inductor ahead of time, or from C++.

Unless a program says otherwise intermediate results are rounded where torch rounds them, so that a function gives the
same bits as before it was compiled, wherever its sums run in the same order. Knows nothing of who asks and where the
library is kept.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from model_runner.compiled import native
from model_runner.compiled.program import Kernel, Program

EXAMPLE = 8
"""The size that a function is compiled from, where it may be any: not 1, which torch would take for a constant."""

SETTINGS = {
    "compile_threads": 1,
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
    "aot_inductor.enable_line_tables": False,
}
"""Inductor's, where this torch has them. Precompiled headers save 1.4 s a function, and take 5 s and 288 MB first."""


def find_compiler() -> str | None:
    """The C++ compiler that Inductor would call; None where there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def load(library: Path, program: Program) -> Kernel:
    """What can be called of a library. Loading it runs code in it. Raises whatever torch does."""
    if program.source is not None:
        return native.load(library, len(program.arguments(1)))
    runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    kernel: Kernel = runner.run
    return kernel


def compile_program(program: Program, library: Path, threads: int) -> None:
    """Writes the library, an absolute path that ends in .so, for so many threads. Raises whatever torch does."""
    if program.source is not None:
        native.build(find_compiler() or "g++", program.source, program.defines, library)
    else:
        _compile_module(program, library, threads)


def _compile_module(program: Program, library: Path, threads: int) -> None:
    import torch._inductor
    from torch._inductor import config

    arguments = program.arguments(EXAMPLE)
    settings: dict[str, Any] = {name: value for name, value in SETTINGS.items() if _known(config, name)}
    settings["cpp.threads"] = threads
    settings["emulate_precision_casts"] = program.exact
    names = {name for dimensions in program.dynamic for name in (dimensions or {}).values()}
    dims = {name: torch.export.Dim(name, min=1) for name in names}
    shapes = tuple({number: dims[name] for number, name in (entry or {}).items()} for entry in program.dynamic)
    with torch.no_grad(), config.patch(settings):
        module: Any = torch.export.export(program.module, arguments, dynamic_shapes=shapes).module()
        torch._inductor.aot_compile(module, arguments, options={"aot_inductor.output_path": str(library)})


def _known(config: Any, name: str) -> bool:
    group, _, leaf = name.rpartition(".")
    return hasattr(getattr(config, group) if group else config, leaf)
