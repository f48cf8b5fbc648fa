"""One function to one shared library, by the machine's C++ compiler, and from there to a call.

A library is linked to torch's own and to no other, so its threads are torch's threads. Knows nothing of what is
computed, of who asks and where the library is kept.
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

from model_runner.compute.kernels.cpu.functions.program import Argument, Kernel

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-w")
DEFINES = {"bfloat16": ("BFLOAT16",), "float32": ()}


class BuildError(Exception):
    """What the compiler said first."""


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, or the system's; None where there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def build(source: Path, defines: Sequence[str], library: Path) -> None:
    """Writes the library. Raises BuildError."""
    compiler, code, torch_lib = find_compiler() or "g++", library.with_suffix(".o"), Path(torch.__file__).parent / "lib"
    _call([compiler, *FLAGS, *(f"-D{name}" for name in defines), "-c", str(source), "-o", str(code)])
    _call([compiler, "-shared", str(code), "-o", str(library), f"-L{torch_lib}", "-ltorch_cpu"])


def load(library: Path, arguments: Sequence[Argument]) -> Kernel:
    """What can be called of a library, with such arguments. Loading it runs code in it. Raises OSError."""
    run = ctypes.CDLL(str(library)).run
    run.argtypes, run.restype = [_type(argument) for argument in arguments], None

    def kernel(*given: Argument) -> None:
        run(*[one.data_ptr() if isinstance(one, torch.Tensor) else one for one in given])

    return kernel


def _type(argument: Argument) -> type[ctypes.c_void_p] | type[ctypes.c_int64] | type[ctypes.c_float]:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_float


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(str(error)) from error
    if done.returncode:
        said = (line for line in done.stderr.splitlines() if "error" in line)
        raise BuildError(next(said, f"{command[0]} ended with {done.returncode}"))
