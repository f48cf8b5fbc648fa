"""A directory that is no PEFT directory is named for what it is; Git-LFS pointers are named with their command."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from engine.adapter_layouts.foreign import describe
from engine.directory import Directory, PointerInstead

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n"


def header(*names: str, **metadata: str) -> bytes:
    """Returns a safetensors file with empty tensors of these names."""
    entries = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    return struct.pack("<Q", len(text)) + text


LAYOUTS: dict[str, tuple[dict[str, bytes], str]] = {
    "kohya": ({"last.safetensors": header("lora_unet_down.lora_up.weight")}, "kohya"),
    "kohya by its metadata": ({"x.safetensors": header("a", ss_network_module="networks.lora")}, "kohya"),
    "GGUF": ({"sql-f16.gguf": b"GGUF"}, "GGUF"),
    "mistral-finetune": (
        {"lora.safetensors": header("layers.0.attention.wq.lora_A.weight"), "params.json": b"{}"},
        "mistral-finetune",
    ),
    "NeMo": ({"sql.nemo": b""}, "NeMo"),
    "NeMo 2": ({"weights/common.pt": b"", "adapter_metadata.json": b"{}"}, "NeMo"),
    "Megatron": ({"latest_checkpointed_iteration.txt": b"7", "iter_0000007/mp_rank_00/model.pt": b""}, "Megatron"),
    "DeepSpeed": ({"zero_to_fp32.py": b"", "global_step7/x.pt": b"", "latest": b"global_step7"}, "DeepSpeed"),
    "mlx-lm without its config": ({"adapters.safetensors": header("model.layers.0.q_proj.lora_a")}, "mlx-lm"),
    "weights alone": ({"adapter_model.safetensors": header("a")}, 'with "peft_type", "r" and "lora_alpha"'),
    "a whole model": ({"config.json": b"{}", "model.safetensors": header("a")}, "--model-path"),
    "nothing": ({"README.md": b""}, "there is no adapter_config.json in it"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_directory_is_named_for_what_it_is(layout: str, tmp_path: Path) -> None:
    files, says = LAYOUTS[layout]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with Directory(tmp_path) as directory:
        assert says in describe(directory)


def test_adapters_below_are_named_the_latest_first(tmp_path: Path) -> None:
    for below in ("checkpoint-9", "checkpoint-57", "runs", "global_step_60/actor/lora_adapter"):
        (tmp_path / below).mkdir(parents=True)
    for below in ("checkpoint-9", "checkpoint-57"):
        (tmp_path / below / "adapter_config.json").write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path)
    with Directory(tmp_path) as directory:
        assert describe(directory).endswith(f"checkpoint-9: give {tmp_path}/checkpoint-57")
        (tmp_path / "global_step_60/actor/lora_adapter/adapter_config.json").write_text("{}")
        assert describe(directory).endswith(f"give {tmp_path}/global_step_60/actor/lora_adapter")


def test_lfs_pointer_is_refused_with_a_command_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, tools = tmp_path / "an adapter", tmp_path / "bin"
    root.mkdir()
    tools.mkdir()
    (root / "adapter_config.json").write_text(POINTER)
    fetch = tools / "git-lfs"  # stands for Git-LFS: it replaces the pointers of its directory
    fetch.write_text('#!/bin/sh\n[ "$1" = pull ] && echo "{}" > adapter_config.json\n')
    fetch.chmod(fetch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    with Directory(root) as directory:
        for read in (
            lambda: directory.read("adapter_config.json", 1 << 20),
            lambda: directory.open("adapter_config.json"),
        ):
            with pytest.raises(PointerInstead, match=r"^adapter_config.json: a Git-LFS pointer") as refusal:
                read()
        command = refusal.value.message.partition("run: ")[2]
        subprocess.run(["git", "init", "-q", str(root)], check=True)
        subprocess.run(command, shell=True, check=True, timeout=60)
        assert directory.read("adapter_config.json", 1 << 20) == b"{}\n"
