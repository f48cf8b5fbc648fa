"""Compiled functions as a runner meets them: made once, kept, tried before use, not missed where they fail."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.errors import ConfigError
from model_runner.compiled import compiler, functions
from model_runner.compiled.cache import Cache
from model_runner.compiled.kernels import Kernels, resolve
from model_runner.compiled.messages import Order
from model_runner.compiled.program import Function, Kernel, Program
from model_runner.ops.torch_ops import TorchOps

NORM = Function("add_norm", (48,), "bfloat16", (1e-5,))
GATE = Function("silu_mul", (40,), "float32")
CPU = torch.device("cpu")
PATIENCE = 120.0

needs_compiler = pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that a first start filled with NORM and GATE; nothing else here needs a compiler."""
    root = tmp_path_factory.mktemp("cache") / "compiled"
    kernels = Kernels("first", root)
    kernels.want((NORM, GATE, NORM))
    assert not kernels.building
    assert kernels.get(NORM) is not None
    assert kernels.get(GATE) is not None
    return root


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")


def load(root: Path, *wanted: Function) -> Kernels:
    """A later start, which compiles nothing."""
    kernels = Kernels("beside", root)
    kernels.want(wanted)
    assert not kernels.building
    return kernels


def there(kernels: Kernels, function: Function) -> Kernel:
    kernel = kernels.get(function)
    assert kernel is not None
    return kernel


def settle(kernels: Kernels) -> None:
    """Polls as a runner does, until nothing more can come."""
    deadline = time.monotonic() + PATIENCE
    while kernels.building:
        assert time.monotonic() < deadline
        kernels.poll()
        time.sleep(0.01)


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 200])
def test_they_compute_what_torch_does(kept: Path, no_compiler: None, tokens: int) -> None:
    kernels = load(kept, NORM, GATE)
    with torch.inference_mode():
        x, residual = (draw(tokens, 48, dtype=torch.bfloat16) * factor for factor in (1, 3))
        weight = draw(48, dtype=torch.bfloat16)
        wanted = TorchOps().add_norm(x, residual, weight, 1e-5)
        for got, right in zip(there(kernels, NORM)([x, residual, weight]), wanted, strict=True):
            torch.testing.assert_close(got, right, rtol=2**-7, atol=0)
        gate_up = draw(tokens, 80, dtype=torch.float32)
        (got,) = there(kernels, GATE)([gate_up])
        torch.testing.assert_close(got, TorchOps().silu_mul(gate_up))


@needs_compiler
def test_a_second_start_compiles_nothing(kept: Path, no_compiler: None, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.read_bytes() for path in kept.glob("*.so")}
    with caplog.at_level(logging.INFO):
        kernels = Kernels("first", kept)
        kernels.want((NORM, GATE))
    assert (kernels.get(NORM) is not None, kernels.get(GATE) is not None) == (True, True)
    assert "2 small functions compiled earlier" in caplog.text
    assert {path: path.read_bytes() for path in kept.glob("*.so")} == before
    assert not list(kept.glob("build-*"))


@needs_compiler
@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1], lambda data: b"", lambda data: data[:900] + b"?" + data[901:]]
)
def test_a_broken_file_is_removed_and_not_loaded(
    kept: Path, no_compiler: None, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    root = shutil.copytree(kept, tmp_path / "compiled")
    broken = Cache(root).path(GATE, torch.get_num_threads())
    broken.write_bytes(spoil(broken.read_bytes()))
    kernels = load(root, NORM, GATE)
    assert kernels.get(GATE) is None
    assert kernels.get(NORM) is not None
    assert not broken.exists()


@needs_compiler
def test_a_file_that_is_no_library_is_not_used(kept: Path, no_compiler: None, tmp_path: Path) -> None:
    from model_runner.compiled.cache import seal

    root = shutil.copytree(kept, tmp_path / "compiled")
    nonsense = root / "nonsense"
    nonsense.write_bytes(b"nonsense" * 100)
    seal(nonsense, Cache(root).path(GATE, torch.get_num_threads()))
    kernels = load(root, NORM, GATE)
    assert kernels.get(GATE) is None
    assert kernels.get(NORM) is not None


class Otherwise(nn.Module):
    """What the compiled gate does not compute."""

    def forward(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_TJ.chunk(2, dim=-1)
        return gate * up


def otherwise(function: Function) -> Program:
    return replace(functions.gates.silu_mul(function), module=Otherwise())


@needs_compiler
def test_one_that_computes_something_else_is_not_used(
    kept: Path, no_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(kept, tmp_path / "compiled")
    right = Cache(root).path(GATE, torch.get_num_threads())
    monkeypatch.setitem(functions.FUNCTIONS, "silu_mul", otherwise)
    right.rename(Cache(root).path(GATE, torch.get_num_threads()))
    with caplog.at_level(logging.WARNING):
        kernels = load(root, NORM, GATE)
    assert kernels.get(GATE) is None
    assert kernels.get(NORM) is not None
    (line,) = (record.message for record in caplog.records)
    assert "silu_mul(40) in float32 as compiled is not used: at size 1: off by" in line


@pytest.mark.skipif(not shutil.which("false"), reason="no such command")
def test_a_compiler_that_fails_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", shutil.which("false") or "")
    kernels = Kernels("beside", tmp_path / "compiled")
    with caplog.at_level(logging.INFO):
        kernels.want((NORM, GATE))
        assert kernels.building
        assert kernels.wait is not None
        assert kernels.get(NORM) is None
        settle(kernels)
    assert kernels.wait is None
    assert (kernels.get(NORM), kernels.get(GATE)) == (None, None)
    first, *failed, last = [record.message for record in caplog.records]
    assert first == "compiling 2 small functions beside the serving, about 12 s"
    assert failed
    assert failed[0].startswith("add_norm(48, 1e-05) in bfloat16 is not compiled: ")
    assert last.startswith("compiled: 0 of 2 small functions in place")
    assert {path.name for path in (tmp_path / "compiled").iterdir()} == {"lock"}


def test_without_a_compiler_a_line_says_what_to_install(
    tmp_path: Path, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = load(tmp_path / "compiled", NORM)
    assert kernels.get(NORM) is None
    assert "no C++ compiler found: the small operations stay as they are; install g++" in caplog.text
    with pytest.raises(ConfigError, match=r"--torch-compile on: no C\+\+ compiler found"):
        Kernels("first", tmp_path / "compiled").want((NORM,))


def test_a_builder_that_dies_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", shutil.which("true") or "")
    kernels = Kernels("beside", tmp_path / "compiled")
    kernels.want((NORM, GATE))
    assert kernels.pid is not None
    os.kill(kernels.pid, 9)
    settle(kernels)
    assert caplog.records[-1].message == "the builder was killed by signal 9: 2 small functions stay as they are"
    assert kernels.get(NORM) is None


def test_a_directory_that_others_can_write_to_is_refused(
    tmp_path: Path, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "compiled"
    root.mkdir()
    root.chmod(0o770)
    load(root, NORM)
    assert f"{root}: code is loaded from there, so it must be this user's and closed to others" in caplog.text
    with pytest.raises(ConfigError, match=r"--torch-compile on: .*chmod 700"):
        Kernels("first", root).want((NORM,))


def test_nothing_is_wanted_where_nothing_is_compiled(tmp_path: Path) -> None:
    kernels = Kernels("never", tmp_path / "compiled")
    kernels.want((NORM,))
    kernels.poll()
    assert kernels.get(NORM) is None
    assert not (tmp_path / "compiled").exists()


def test_what_the_flag_means() -> None:
    cuda, bf16, f32 = torch.device("cuda"), torch.bfloat16, torch.float32
    assert [resolve(mode, CPU, bf16) for mode in ("auto", "on", "off")] == ["beside", "first", "never"]
    assert [resolve(mode, CPU, f32) for mode in ("auto", "on", "off")] == ["never", "first", "never"]
    assert resolve("auto", cuda, bf16) == resolve("off", cuda, bf16) == "never"
    with pytest.raises(ConfigError, match="--torch-compile on: compiles for a CPU only"):
        resolve("on", cuda, bf16)


@needs_compiler
def test_what_takes_half_a_second_is_compiled_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered: list[Function] = []

    def builder(order: Order) -> None:
        ordered.extend(job.function for job in order.jobs)
        raise OSError("no more")

    monkeypatch.setattr("model_runner.compiled.kernels.Builder", builder)
    delta, decodes = Function("delta", (), "float32"), Function("decodes", (), "float32")
    Kernels("beside", tmp_path / "compiled").want((NORM, decodes, GATE, delta))
    assert ordered == [decodes, delta, NORM, GATE]
