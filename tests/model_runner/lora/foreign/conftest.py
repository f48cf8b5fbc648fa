"""A base with an untied head, and decoders of other families as the runner loads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from model_runner.config import read_model_config
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.load import load_model


@pytest.fixture(scope="session")
def decoder_of(tiny_model: Callable[[str], Path]) -> Callable[[str], Decoder]:
    """Returns a function that loads the tiny model of a family, once."""

    @cache
    def load(family: str) -> Decoder:
        path = tiny_model(family)
        return load_model(path, read_model_config(path), device=torch.device("cpu"), dtype=torch.float32)

    return load


@pytest.fixture(scope="session")
def model(tiny_model: Callable[[str], Path]) -> Path:
    """A base whose head is its own."""
    return tiny_model("qwen2")


@pytest.fixture(scope="session")
def decoder(decoder_of: Callable[[str], Decoder]) -> Decoder:
    """This base as the runner loads it."""
    return decoder_of("qwen2")
