"""The setup that all tests share: one torch thread, no network, a fixed hypothesis profile, tiny models built once.

Without a GPU, triton's kernels run in its interpreter, here and in every process that a test starts. A separate child
process compiles them ahead of time (tests/fixtures/models/ahead_of_time.py).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read at the import of triton, which torch does not import at once
torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup a launcher ignores it, and so would those of the tests
settings.register_profile(
    "chorus",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("chorus")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns `tiny_model`: `tiny_model("llama3")` is the directory of a tiny model (seed 0, float32), built once."""
    from fixtures.models.tiny_models import build

    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            built[family] = build(family, tmp_path_factory.mktemp("models") / family)
        return built[family]

    return get


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
