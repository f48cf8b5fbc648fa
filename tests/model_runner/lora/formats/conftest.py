"""A base with an adapter of each format, saved by PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.adapters.adapter_zoo import ZOO, save

from model_runner.config import read_model_config
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.load import load_model


@pytest.fixture(scope="session")
def model(tiny_model: Callable[[str], Path]) -> Path:
    """A base with biases everywhere and an untied head."""
    return tiny_model("llama-bias")


@pytest.fixture(scope="session")
def decoder(model: Path) -> Decoder:
    """The base as the runner loads it."""
    return load_model(model, read_model_config(model), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="session")
def zoo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of each format."""
    root = tmp_path_factory.mktemp("zoo")
    return {name: save(model, root / name, config(), seed) for seed, (name, config) in enumerate(ZOO.items())}


@pytest.fixture
def copy(zoo: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Returns a function that copies one of these adapters, so that the test may change it."""
    return lambda name: Path(shutil.copytree(zoo[name], tmp_path / "copy"))
