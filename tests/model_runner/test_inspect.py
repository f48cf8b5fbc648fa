"""`model_runner.inspect` on a valid adapter, one above a limit, and a broken one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.models.tiny_models import make_adapter

from model_runner.inspect import examine, main, sites_of
from model_runner.lora.loading.limits import Limits
from model_runner.lora.store import AdapterStore


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    """The directory of the base model."""
    return tiny_model("llama3")


@pytest.fixture(scope="module")
def root(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an adapter with two different ranks."""
    out = tmp_path_factory.mktemp("adapter") / "fox"
    return make_adapter(model, out, r=20, targets=["q_proj", "v_proj", "down_proj"], rank_pattern={"v_proj": 3})


def test_report_equals_what_the_store_loads(model: Path, root: Path) -> None:
    sites, dtype = sites_of(model, "float32")
    assert {site.base.weight.device.type for site in sites} == {"meta"}
    report = examine(root, sites, dtype, Limits())
    adapter = AdapterStore(sites, torch.float32, max_rank=None, targets=None).load(1, "fox", root)
    assert report.refused is None
    assert (report.revision, report.lora_rank) == (adapter.revision, 20)
    assert {group: held.pages for group, held in report.groups.items()} == adapter.footprint.pages
    assert report.groups["down"].bytes == 3 * 2 * 16 * (96 + 64) * 4
    assert report.ranks == {"down_proj": [20], "q_proj": [20], "v_proj": [3]}
    assert adapter.bytes <= report.host_bytes < adapter.bytes * 1.1
    assert (report.tensors, report.cast_from) == (18, [])
    assert examine(root, sites, torch.bfloat16, Limits()).cast_from == ["float32"]


def test_report_names_the_limit_and_stays_complete(model: Path, root: Path) -> None:
    sites, dtype = sites_of(model, "float32")
    for limits, says in (
        (Limits(19), "--max-lora-rank 19"),
        (Limits(None, ["q_proj"]), "--lora-target-modules q_proj"),
    ):
        report = examine(root, sites, dtype, limits)
        assert says in (report.refused or "")
        assert report.lora_rank == 20


def test_command_prints_the_report_and_exit_status(
    model: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model-path", str(model)]
    assert main([str(root), *base]) == 0
    text = capsys.readouterr().out
    for part in ("PEFT LoRA", "base_model.model.*.lora_A.weight", "v_proj 3", "qkv 2", "served"):
        assert part in text
    assert main([str(tmp_path), *base]) == 1
    assert "there is no adapter_config.json in it" in capsys.readouterr().out
    assert main([str(root), "--model-path", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(root), *base, "--max-lora-rank", "513"])


def test_command_as_a_process_prints_json(model: Path, root: Path) -> None:
    command = [sys.executable, "-m", "model_runner.inspect", str(root), "--model-path", str(model), "--json"]
    done = subprocess.run([*command, "--max-lora-rank", "8"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert (report["lora_rank"], "--max-lora-rank 8" in report["refused"]) == (20, True)
