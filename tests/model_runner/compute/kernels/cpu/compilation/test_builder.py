"""The builder as a real process: it and its compiler end with their parent and leave no files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from fixtures.processes.watched import runs, wait_for

from model_runner.compute.kernels.cpu.compilation.__main__ import NICENESS
from model_runner.compute.kernels.cpu.compilation.builder import Builder
from model_runner.compute.kernels.cpu.compilation.cache import KernelCache
from model_runner.compute.kernels.cpu.compilation.messages import BuildJob, BuildOrder
from model_runner.compute.kernels.cpu.functions.spec import KernelKey

NORM = KernelKey("add_norm")

PARENT = """
import sys, time
from pathlib import Path
from model_runner.compute.kernels.cpu.compilation.builder import Builder
from model_runner.compute.kernels.cpu.compilation.messages import BuildJob, BuildOrder
from model_runner.compute.kernels.cpu.functions.spec import KernelKey
builder = Builder(BuildOrder([BuildJob(KernelKey("add_norm"), sys.argv[1])]))
print(builder.pid, flush=True)
time.sleep(1000)
"""


def test_builder_and_compiler_end_with_a_killed_parent(hanging_compiler: Path, tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "compiled")
    command = [sys.executable, "-c", PARENT, str(cache.path(NORM))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        builder = int(parent.stdout.readline())
        try:
            wait_for(hanging_compiler.exists)
            compiler = int(hanging_compiler.read_text())
            assert runs(builder)
            assert runs(compiler)
            assert os.getpriority(os.PRIO_PROCESS, compiler) - os.getpriority(os.PRIO_PROCESS, 0) == NICENESS
            assert list(cache.root.glob("build-*"))
        finally:
            parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not runs(builder))
    wait_for(lambda: not runs(compiler))
    assert not list(cache.root.glob("build-*"))


def test_stopped_builder_leaves_no_process_and_no_file(hanging_compiler: Path, tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "compiled")
    builder = Builder(BuildOrder([BuildJob(NORM, str(cache.path(NORM)))]))
    wait_for(hanging_compiler.exists)
    assert builder.receive() is None
    builder.stop()
    assert not runs(builder.pid)
    wait_for(lambda: not runs(int(hanging_compiler.read_text())))
    assert not list(cache.root.glob("build-*"))
