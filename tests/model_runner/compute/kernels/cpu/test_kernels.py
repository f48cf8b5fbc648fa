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

from engine.errors import ConfigError
from model_runner.compute.kernels.cpu.compilation import compiler
from model_runner.compute.kernels.cpu.compilation.cache import Cache
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.program import Function, Kernel, Program
from model_runner.compute.kernels.cpu.kernels import Kernels, resolve
from model_runner.compute.ops.torch_ops import TorchOps

NORM = Function("add_norm")
GATE = Function("silu_mul", "float32")
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
        weight, normed, total = draw(48, dtype=torch.bfloat16), torch.empty_like(x), torch.empty_like(x)
        there(kernels, NORM)(x, residual, weight, normed, total, tokens, 48, 1e-5)
        for got, right in zip((normed, total), TorchOps().add_norm(x, residual, weight, 1e-5), strict=True):
            torch.testing.assert_close(got, right, rtol=2**-7, atol=0)
        gate_up, out = draw(tokens, 80, dtype=torch.float32), torch.empty(tokens, 40)
        there(kernels, GATE)(gate_up, out, tokens, 40)
        torch.testing.assert_close(out, TorchOps().silu_mul(gate_up))


@needs_compiler
def test_a_second_start_compiles_nothing(kept: Path, no_compiler: None, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.read_bytes() for path in kept.glob("*.so")}
    with caplog.at_level(logging.INFO):
        kernels = Kernels("first", kept)
        kernels.want((NORM, GATE))
    assert (kernels.get(NORM) is not None, kernels.get(GATE) is not None) == (True, True)
    assert "2 kernels compiled earlier" in caplog.text
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
    broken = Cache(root).path(GATE)
    broken.write_bytes(spoil(broken.read_bytes()))
    kernels = load(root, NORM, GATE)
    assert kernels.get(GATE) is None
    assert kernels.get(NORM) is not None
    assert not broken.exists()


@needs_compiler
def test_a_file_that_is_no_library_is_not_used(kept: Path, no_compiler: None, tmp_path: Path) -> None:
    from model_runner.compute.kernels.cpu.compilation.cache import seal

    root = shutil.copytree(kept, tmp_path / "compiled")
    nonsense = root / "nonsense"
    nonsense.write_bytes(b"nonsense" * 100)
    seal(nonsense, Cache(root).path(GATE))
    kernels = load(root, NORM, GATE)
    assert kernels.get(GATE) is None
    assert kernels.get(NORM) is not None


def otherwise(dtype: torch.dtype) -> Program:
    """What the compiled gate does not compute."""

    def reference(gate_up_TJ: torch.Tensor, out_TI: torch.Tensor, tokens: int, inner: int) -> None:
        gate, up = gate_up_TJ.chunk(2, dim=-1)
        torch.mul(gate, up, out=out_TI)

    return replace(registry.gates.silu_mul(dtype), reference=reference)


@needs_compiler
def test_one_that_computes_something_else_is_not_used(
    kept: Path, no_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(kept, tmp_path / "compiled")
    right = Cache(root).path(GATE)
    monkeypatch.setitem(registry.FUNCTIONS, "silu_mul", otherwise)
    right.rename(Cache(root).path(GATE))
    with caplog.at_level(logging.WARNING):
        kernels = load(root, NORM, GATE)
    assert kernels.get(GATE) is None
    assert kernels.get(NORM) is not None
    (line,) = (record.message for record in caplog.records)
    assert "silu_mul in float32 as compiled is not used: at size 1: off by" in line


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
    assert first == "compiling 2 kernels beside the serving, about 2 s"
    assert failed
    assert failed[0].startswith("add_norm in bfloat16 is not compiled: ")
    assert last.startswith("compiled: 0 of 2 kernels in place")
    assert {path.name for path in (tmp_path / "compiled").iterdir()} == {"lock"}


def test_without_a_compiler_a_line_says_what_to_install(
    tmp_path: Path, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = load(tmp_path / "compiled", NORM)
    assert kernels.get(NORM) is None
    assert "no C++ compiler found: plain torch computes, which is slower; install g++" in caplog.text
    with pytest.raises(ConfigError, match=r"--cpu-kernels on: no C\+\+ compiler found"):
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
    assert caplog.records[-1].message == "the builder was killed by signal 9: 2 kernels stay as they are"
    assert kernels.get(NORM) is None


def test_a_directory_that_others_can_write_to_is_refused(
    tmp_path: Path, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "compiled"
    root.mkdir()
    root.chmod(0o770)
    load(root, NORM)
    assert f"{root}: code is loaded from there, so it must be this user's and closed to others" in caplog.text
    with pytest.raises(ConfigError, match=r"--cpu-kernels on: .*chmod 700"):
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
    assert resolve("auto", CPU, torch.float16) == "never"
    with pytest.raises(ConfigError, match="--cpu-kernels on: they compute in bfloat16 and float32, not in float16"):
        resolve("on", CPU, torch.float16)
    with pytest.raises(ConfigError, match="--cpu-kernels on: they are for a CPU"):
        resolve("on", cuda, bf16)
