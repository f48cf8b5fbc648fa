"""KernelSet: kernels are compiled once, cached and checked before use, and torch replaces the ones that fail."""

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
from model_runner.compute.kernels.cpu.compilation.cache import KernelCache
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.spec import Kernel, KernelKey, KernelSpec
from model_runner.compute.kernels.cpu.kernels import KernelSet, resolve
from model_runner.compute.ops.torch_ops import TorchOps

NORM = KernelKey("add_norm")
GATE = KernelKey("silu_mul", "float32")
CPU = torch.device("cpu")
BUILD_SECONDS = 120.0

needs_compiler = pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory with NORM and GATE compiled, so that the other tests here need no compiler."""
    root = tmp_path_factory.mktemp("cache") / "compiled"
    kernels = KernelSet("before_serving", root)
    kernels.request((NORM, GATE, NORM))
    assert not kernels.building
    assert kernels.get(NORM) is not None
    assert kernels.get(GATE) is not None
    return root


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")


def load(root: Path, *wanted: KernelKey) -> KernelSet:
    """Returns a kernel set that finds its kernels in the cache and compiles nothing."""
    kernels = KernelSet("background", root)
    kernels.request(wanted)
    assert not kernels.building
    return kernels


def get(kernels: KernelSet, key: KernelKey) -> Kernel:
    kernel = kernels.get(key)
    assert kernel is not None
    return kernel


def poll_until_done(kernels: KernelSet) -> None:
    """Polls as a runner does, until the builder has ended."""
    deadline = time.monotonic() + BUILD_SECONDS
    while kernels.building:
        assert time.monotonic() < deadline
        kernels.poll()
        time.sleep(0.01)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 200])
def test_cached_kernels_compute_what_torch_does(cached: Path, no_compiler: None, tokens: int) -> None:
    kernels = load(cached, NORM, GATE)
    with torch.inference_mode():
        x, residual = (random(tokens, 48, dtype=torch.bfloat16) * factor for factor in (1, 3))
        weight, normed, total = random(48, dtype=torch.bfloat16), torch.empty_like(x), torch.empty_like(x)
        get(kernels, NORM)(x, residual, weight, normed, total, tokens, 48, 1e-5)
        for got, right in zip((normed, total), TorchOps().add_norm(x, residual, weight, 1e-5), strict=True):
            torch.testing.assert_close(got, right, rtol=2**-7, atol=0)
        gate_up, out = random(tokens, 80, dtype=torch.float32), torch.empty(tokens, 40)
        get(kernels, GATE)(gate_up, out, tokens, 40)
        torch.testing.assert_close(out, TorchOps().silu_mul(gate_up))


@needs_compiler
def test_second_start_compiles_nothing(cached: Path, no_compiler: None, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.read_bytes() for path in cached.glob("*.so")}
    with caplog.at_level(logging.INFO):
        kernels = KernelSet("before_serving", cached)
        kernels.request((NORM, GATE))
    assert (kernels.get(NORM) is not None, kernels.get(GATE) is not None) == (True, True)
    assert "2 kernels compiled earlier" in caplog.text
    assert {path: path.read_bytes() for path in cached.glob("*.so")} == before
    assert not list(cached.glob("build-*"))


@needs_compiler
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:900] + b"?" + data[901:]]
)
def test_damaged_file_is_removed_and_not_loaded(
    cached: Path, no_compiler: None, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    root = shutil.copytree(cached, tmp_path / "compiled")
    damaged = KernelCache(root).path(GATE)
    damaged.write_bytes(damage(damaged.read_bytes()))
    kernels = load(root, NORM, GATE)
    assert kernels.get(GATE) is None
    assert kernels.get(NORM) is not None
    assert not damaged.exists()


@needs_compiler
def test_file_that_is_no_library_is_not_used(cached: Path, no_compiler: None, tmp_path: Path) -> None:
    from model_runner.compute.kernels.cpu.compilation.cache import install

    root = shutil.copytree(cached, tmp_path / "compiled")
    nonsense = root / "nonsense"
    nonsense.write_bytes(b"nonsense" * 100)
    install(nonsense, KernelCache(root).path(GATE))
    kernels = load(root, NORM, GATE)
    assert kernels.get(GATE) is None
    assert kernels.get(NORM) is not None


def other_reference(dtype: torch.dtype) -> KernelSpec:
    """Returns a spec whose reference differs from what the compiled gate computes."""

    def reference(gate_up_TJ: torch.Tensor, out_TI: torch.Tensor, tokens: int, inner: int) -> None:
        gate, up = gate_up_TJ.chunk(2, dim=-1)
        torch.mul(gate, up, out=out_TI)

    return replace(registry.gate.silu_mul(dtype), reference=reference)


@needs_compiler
def test_kernel_with_wrong_results_is_not_used(
    cached: Path, no_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(cached, tmp_path / "compiled")
    right = KernelCache(root).path(GATE)
    monkeypatch.setitem(registry.SPECS, "silu_mul", other_reference)
    right.rename(KernelCache(root).path(GATE))
    with caplog.at_level(logging.WARNING):
        kernels = load(root, NORM, GATE)
    assert kernels.get(GATE) is None
    assert kernels.get(NORM) is not None
    (line,) = (record.message for record in caplog.records)
    assert "silu_mul in float32 as compiled is not used: at size 1: off by" in line


@pytest.mark.skipif(not shutil.which("false"), reason="no such command")
def test_failing_compiler_logs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", shutil.which("false") or "")
    kernels = KernelSet("background", tmp_path / "compiled")
    with caplog.at_level(logging.INFO):
        kernels.request((NORM, GATE))
        assert kernels.building
        assert kernels.poll_seconds is not None
        assert kernels.get(NORM) is None
        poll_until_done(kernels)
    assert kernels.poll_seconds is None
    assert (kernels.get(NORM), kernels.get(GATE)) == (None, None)
    first, *failed, last = [record.message for record in caplog.records]
    assert first == "compiling 2 kernels while serving, about 2 s"
    assert failed
    assert failed[0].startswith("add_norm in bfloat16 is not compiled: ")
    assert last.startswith("compiled: 0 of 2 kernels in use")
    assert {path.name for path in (tmp_path / "compiled").iterdir()} == {"lock"}


def test_missing_compiler_is_logged_with_what_to_install(
    tmp_path: Path, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = load(tmp_path / "compiled", NORM)
    assert kernels.get(NORM) is None
    assert "no C++ compiler found: plain torch computes, which is slower; install g++" in caplog.text
    with pytest.raises(ConfigError, match=r"--cpu-kernels on: no C\+\+ compiler found"):
        KernelSet("before_serving", tmp_path / "compiled").request((NORM,))


def test_killed_builder_logs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", shutil.which("true") or "")
    kernels = KernelSet("background", tmp_path / "compiled")
    kernels.request((NORM, GATE))
    assert kernels.builder_pid is not None
    os.kill(kernels.builder_pid, 9)
    poll_until_done(kernels)
    assert caplog.records[-1].message == "the builder was killed by signal 9: torch computes in place of 2 kernels"
    assert kernels.get(NORM) is None


def test_directory_that_others_can_write_to_is_refused(
    tmp_path: Path, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "compiled"
    root.mkdir()
    root.chmod(0o770)
    load(root, NORM)
    assert (
        f"{root}: code is loaded from there, so it must belong to this user and be closed to all others" in caplog.text
    )
    with pytest.raises(ConfigError, match=r"--cpu-kernels on: .*chmod 700"):
        KernelSet("before_serving", root).request((NORM,))


def test_build_mode_never_requests_nothing(tmp_path: Path) -> None:
    kernels = KernelSet("never", tmp_path / "compiled")
    kernels.request((NORM,))
    kernels.poll()
    assert kernels.get(NORM) is None
    assert not (tmp_path / "compiled").exists()


def test_resolve_gives_the_build_mode_of_the_flag() -> None:
    cuda, bf16, f32 = torch.device("cuda"), torch.bfloat16, torch.float32
    assert [resolve(mode, CPU, bf16) for mode in ("auto", "on", "off")] == ["background", "before_serving", "never"]
    assert [resolve(mode, CPU, f32) for mode in ("auto", "on", "off")] == ["never", "before_serving", "never"]
    assert resolve("auto", cuda, bf16) == resolve("off", cuda, bf16) == "never"
    assert resolve("auto", CPU, torch.float16) == "never"
    with pytest.raises(ConfigError, match="--cpu-kernels on: they compute in bfloat16 and float32, not in float16"):
        resolve("on", CPU, torch.float16)
    with pytest.raises(ConfigError, match="--cpu-kernels on: they are for a CPU"):
        resolve("on", cuda, bf16)
