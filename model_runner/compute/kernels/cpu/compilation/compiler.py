"""Compiles a kernel's source to a shared library with the machine's C++ compiler, and loads it as a callable.

A library is linked only against torch's CPU library, so it uses torch's OpenMP threads. Does not depend on what a
kernel computes or where its library is kept.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model_runner.compute.kernels.cpu.functions.spec import Argument, Kernel

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-w")
DEFINES = {"bfloat16": ("BFLOAT16",), "float32": ()}


class BuildError(Exception):
    """Raised when compiling fails; the message is the compiler's first error."""


def find_compiler() -> str | None:
    """Returns the path of the C++ compiler: $CXX, or else the system's; None if there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def build(source: Path, defines: Sequence[str], library: Path) -> None:
    """Compiles `source` and links it to `library`. Raises BuildError if the compiler fails."""
    compiler, object_file = find_compiler() or "g++", library.with_suffix(".o")
    torch_lib = Path(torch.__file__).parent / "lib"
    _run([compiler, *FLAGS, *(f"-D{name}" for name in defines), "-c", str(source), "-o", str(object_file)])
    _run([compiler, "-shared", str(object_file), "-o", str(library), f"-L{torch_lib}", "-ltorch_cpu"])


def load(library: Path, arguments: Sequence[Argument]) -> Kernel:
    """Returns the library's function `run` as a callable for arguments of these types. Loading runs the library's code.

    Raises OSError if the library cannot be loaded.
    """
    run = ctypes.CDLL(str(library)).run
    run.argtypes, run.restype = [_type(argument) for argument in arguments], None

    def kernel(*arguments: Argument) -> None:
        run(*[value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments])

    return kernel


def _type(argument: Argument) -> type[ctypes.c_void_p] | type[ctypes.c_int64] | type[ctypes.c_float]:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_float


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(str(error)) from error
    if done.returncode:
        errors = (line for line in done.stderr.splitlines() if "error:" in line)
        raise BuildError(next(errors, f"{command[0]} ended with status {done.returncode}"))
