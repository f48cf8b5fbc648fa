"""The interface of linear methods, with a method of this test: created, placed, loaded and applied in whole models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.models.drive import Driver, Row
from safetensors.torch import load_file, save_file

from model_runner.config import read_model_config
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.load import load_model
from model_runner.platform.shard import Shard
from model_runner.quantization import base
from model_runner.quantization.base import ALL, Empty, LinearMethod, Parameter
from model_runner.quantization.plain import Plain
from model_runner.weights.checkpoint import SINGLE

CPU = torch.device("cpu")
LINEARS = ("_proj.weight", "lm_head.weight")


class Transposed(LinearMethod):
    """A method whose checkpoint holds [I, O] under another name, and negated values until loading is finished."""

    def __init__(self, weight_IO: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight_IO, self.bias = weight_IO, bias

    @classmethod
    def create(cls, empty: Empty, out_features: int, in_features: int, *, bias: bool) -> Transposed:
        return cls(empty(in_features, out_features), empty(out_features) if bias else None)

    def parameters(self) -> dict[str, Parameter]:
        found = {"negated": Parameter(self.weight_IO, out_dim=1, in_dim=0)}
        return found if self.bias is None else found | {"bias": Parameter(self.bias)}

    def finish_loading(self) -> None:
        self.weight_IO = -self.weight_IO

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight_IO.shape[::-1])

    @property
    def device(self) -> torch.device:
        return self.weight_IO.device

    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        y_TO = x_TI @ self.weight_IO
        return y_TO if self.bias is None else y_TO + self.bias

    def dequantize(self, rows: slice = ALL) -> torch.Tensor:
        return self.weight_IO[:, rows].t()


def load(path: Path, method: str = "plain", shard: Shard | None = None) -> Decoder:
    return load_model(path, read_model_config(path), device=CPU, dtype=torch.float32, shard=shard, method=method)


@pytest.fixture
def transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find", {"transposed": Transposed, "plain": Plain}.__getitem__)
    monkeypatch.setattr("model_runner.model.load.find", base.find)


def transpose(source: Path, target: Path) -> Path:
    """Saves the model of `source` to `target` with its linears in the format of `Transposed`. Returns `target`."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {}
    for name, tensor in load_file(source / SINGLE).items():
        is_linear = name.endswith(LINEARS)
        tensors[name.replace(".weight", ".negated") if is_linear else name] = -tensor.t() if is_linear else tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / SINGLE)
    return target


@pytest.mark.usefixtures("transposed")
@pytest.mark.parametrize("family", ["llama3", "qwen2", "phi3"])
def test_another_method_serves_the_same_model(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    plain, other = load(tiny_model(family)), load(transpose(tiny_model(family), tmp_path / "m"), "transposed")
    expected = Driver(plain).step([(Row([5, 6, 7]), 3)])
    torch.testing.assert_close(Driver(other).step([(Row([5, 6, 7]), 3)]), expected, atol=1e-4, rtol=1e-4)
    assert {type(site.base) for site in other.sites if site.group in ("qkv", "o", "gate_up", "down")} == {Transposed}


@pytest.mark.usefixtures("transposed")
@pytest.mark.parametrize("family", ["llama-yarn", "phi3"])
def test_parameters_are_cut_by_their_own_dimensions(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = transpose(tiny_model(family), tmp_path / "m")
    for rank in range(2):
        ours = load(path, "transposed", Shard(rank, 2))
        expected = load(tiny_model(family), "plain", Shard(rank, 2))
        for site, like in zip(ours.sites, expected.sites, strict=True):
            assert site.base.shape == like.base.shape
            assert torch.equal(site.base.dequantize(), like.base.dequantize()), site.name


def test_dequantize_gives_rows_of_the_weight() -> None:
    weight_OI = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for method in (Plain(weight_OI), Transposed(weight_OI.t(), None)):
        assert torch.equal(method.dequantize(), weight_OI)
        assert torch.equal(method.dequantize(slice(2, 5)), weight_OI[2:5])


def test_every_method_in_the_table_can_be_found() -> None:
    assert {name: base.find(name).__name__.lower() for name in base.METHODS} == {name: name for name in base.METHODS}
    assert base.resolve(torch.float32, CPU) == "plain"
    assert base.resolve(torch.bfloat16, torch.device("cuda")) == "plain"
