"""Start-up adapters are read under the roots in their sources, also if they are only surveyed for lack of memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter

from engine.config.process_configs import AdapterSource, Endpoints, LoraPoolSizes, RunnerConfig
from engine.errors import AdapterError
from model_runner.build.startup_adapters import build_adapters
from model_runner.lora.site import EMBED, Site, Slice
from model_runner.quantization.plain import Plain

SITES = random_sites()
ENDPOINTS = Endpoints(tokenizer="t", scheduler="s", runner="r", zmq_server="z")


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_startup_adapter_outside_of_its_roots_is_refused(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_runner.build.startup_adapters.host_memory", lambda: (room, room))
    root = write_adapter(tmp_path / "a", plain_tensors(SITES, ["q_proj"]), target_modules=["q_proj"])
    source = AdapterSource(adapter_id=1, name="a", path="a", root=str(root), roots=[str(tmp_path / "root")])
    config = RunnerConfig(endpoints=ENDPOINTS, model_path="", enable_lora=True, adapters=[source])
    with pytest.raises(AdapterError, match=r"adapter 'a': .* lies outside of --lora-root"):
        build_adapters(config, SITES, torch.float32, torch.device("cpu"), progress=None)


def test_a_successor_needs_the_sizes_and_no_files(tmp_path: Path) -> None:
    embed = Site("embed", "model", 0, EMBED, (Slice("embed_tokens", 0, 10),), Plain(torch.zeros(10, 24)))
    sites = [*SITES, embed]
    root = write_adapter(tmp_path / "a", plain_tensors(SITES, ["q_proj"]), target_modules=["q_proj"])
    source = AdapterSource(adapter_id=1, name="a", path="a", root=str(root))
    config = RunnerConfig(endpoints=ENDPOINTS, model_path="", enable_lora=True, adapters=[source])
    first = build_adapters(config, sites, torch.float32, torch.device("cpu"), progress=None)
    sizes = LoraPoolSizes(first.fit.max_rank, first.fit.targets, first.pages.page_counts, first.pages.extra_vocab)
    shutil.rmtree(root)
    config = msgspec.structs.replace(config, lora_pool=sizes)
    second = build_adapters(config, sites, torch.float32, torch.device("cpu"), progress=None)
    assert (second.fit.max_rank, second.fit.targets, second.fit.flag) == (
        first.fit.max_rank,
        first.fit.targets,
        first.fit.flag,
    )
    assert second.pages.page_counts == first.pages.page_counts
