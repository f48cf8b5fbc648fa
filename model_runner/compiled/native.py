"""C++ of our own to one shared library, by the machine's compiler, and from there to a call.

The library exports `run`, which takes the address of each tensor and gives nothing back. It is linked to torch's
library and to no other, so its threads are torch's threads. Knows nothing of what is computed.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

from model_runner.compiled.program import Kernel

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-w")


class BuildError(Exception):
    """What the compiler said first."""


def build(compiler: str, source: Path, defines: tuple[str, ...], library: Path) -> None:
    """Writes the library. Raises BuildError."""
    code, torch_lib = library.with_suffix(".o"), Path(torch.__file__).parent / "lib"
    _call([compiler, *FLAGS, *(f"-D{name}" for name in defines), "-c", str(source), "-o", str(code)])
    _call([compiler, "-shared", str(code), "-o", str(library), f"-L{torch_lib}", "-ltorch_cpu"])


def load(library: Path, tensors: int) -> Kernel:
    """What can be called of a library that takes so many tensors. Raises OSError."""
    run = ctypes.CDLL(str(library)).run
    run.argtypes, run.restype = [ctypes.c_void_p] * tensors, None

    def kernel(given: list[torch.Tensor]) -> list[torch.Tensor]:
        run(*[tensor.data_ptr() for tensor in given])
        return []

    return kernel


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (line for line in done.stderr.splitlines() if "error" in line)
        raise BuildError(next(said, f"{command[0]} ended with {done.returncode}"))
