"""Links and directories are swapped during loads with --lora-root: no load reads a file outside the root."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter
from fixtures.models import small_tokenizers
from safetensors.torch import save_file

from engine.errors import EngineError
from engine.lora_roots import allowed_roots
from model_runner.lora.normal_form import NormalForm
from model_runner.lora.store import AdapterStore
from tokenizer_proc.adapters.sources import Sources
from tokenizer_proc.adapters.tokenizers import TextTools, TokenizerLibrary
from tokenizer_proc.text.generation_config import GenerationConfig
from tokenizer_proc.text.templates.chat_template import ChatTemplate
from tokenizer_proc.text.tokenizer import Tokenizer

SITES = random_sites()
TARGETS = ["q_proj", "down_proj"]
SWAPS = 1000
ENOUGH = 20
"""The least number of loads that succeed, and of those that are refused: with fewer, no load raced with a swap."""
MOST_SECONDS = 60.0

WEIGHTS, INDEX = "adapter_model.safetensors", "adapter_model.safetensors.index.json"
SHARDS = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
OTHER_SHARDS = [f"adapter_model-0000{number}-of-00003.safetensors" for number in (1, 2)]
Swap = tuple[Callable[[], None], Callable[[], None]]
"""A swap's two halves, called in turn: the first leads to the outside, the second back."""


def write(directory: Path, value: float, alpha: float, shards: list[str]) -> None:
    """Writes an adapter whose numbers and texts all identify it by `value`; its scaled B is `value` * `alpha` / 4."""
    tensors = {name: torch.full_like(tensor, value) for name, tensor in plain_tensors(SITES, TARGETS).items()}
    write_adapter(directory, tensors, target_modules=TARGETS, lora_alpha=alpha)
    (directory / "chat_template.jinja").write_text(f"template of {value}")
    (directory / "generation_config.json").write_text(json.dumps({"temperature": value}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": f"<{value}>"}))
    if shards:
        (directory / WEIGHTS).unlink()
        parts = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
        for shard, part in zip(shards, parts, strict=True):
            save_file(part, directory / shard)
        names = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
        (directory / INDEX).write_text(json.dumps({"weight_map": names}))


def file_swap(inside: Path, outside: Path) -> Swap:
    """Returns a swap that points the link `inside` to `outside` and back to a copy; the path always exists."""
    own = inside.with_name(f"own-{inside.name}.kept")
    inside.rename(own)
    link = inside.with_name("next")

    def point(at: Path) -> Callable[[], None]:
        def swap() -> None:
            link.symlink_to(at)
            link.replace(inside)

        return swap

    point(own)()
    return point(outside), point(own)


def directory_swap(inside: Path, outside: Path) -> Swap:
    """Returns a swap that replaces the directory `inside` by a link to `outside`, and back."""
    kept = inside.with_name(f"{inside.name}-kept")

    def out() -> None:
        inside.rename(kept)
        inside.symlink_to(outside)

    def back() -> None:
        inside.unlink()
        kept.rename(inside)

    return out, back


@contextlib.contextmanager
def swapping(swap: Swap) -> Iterator[list[int]]:
    """Runs a thread that swaps all the time; yields a list whose only number counts the swaps."""
    done, stop, interval = [0], threading.Event(), sys.getswitchinterval()

    def work() -> None:
        while not stop.is_set():
            for half in swap:
                half()
                time.sleep(0.0002)
            done[0] += 1

    sys.setswitchinterval(1e-4)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[TokenizerLibrary]:
    base = small_tokenizers.save(small_tokenizers.byte_level(), tmp_path / "base")
    tools = TextTools(Tokenizer.load(base), ChatTemplate("template of the base"), GenerationConfig(temperature=1.0))
    made = TokenizerLibrary(tools, base)
    yield made
    made.close()


SWAPPED = {
    "weights": (WEIGHTS, [], []),
    "config": ("adapter_config.json", [], []),
    "index": (INDEX, SHARDS, OTHER_SHARDS),
    "shard": (SHARDS[1], SHARDS, SHARDS),
    "template": ("chat_template.jinja", [], []),
    "generation config": ("generation_config.json", [], []),
    "tokenizer config": ("tokenizer_config.json", [], []),
    "directory": ("", [], []),
    "directory above": ("..", [], []),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SWAPPED)
def test_no_load_reads_a_file_outside_of_the_root(kind: str, tmp_path: Path, library: TokenizerLibrary) -> None:
    name, shards, other_shards = SWAPPED[kind]
    root, inside, outside = tmp_path / "root", tmp_path / "root" / "team" / "a", tmp_path / "outside" / "team" / "a"
    write(inside, 1.0, 8, shards)
    write(outside, 7.0, 99, other_shards)
    if kind == "index":  # copies of the shards that the outside index names
        for shard in other_shards:
            shutil.copy(outside / shard, inside)
    if name in ("", ".."):
        swap = directory_swap(*(path if name == "" else path.parent for path in (inside, outside)))
    else:
        swap = file_swap(inside / name, outside / name)
    sources, ends = Sources(allowed_roots([str(root)])), {"loaded": 0, "refused": 0}
    store, number, began = AdapterStore(SITES, torch.float32, max_rank=None, targets=None), 0, time.monotonic()
    with swapping(swap) as swaps:
        while swaps[0] < SWAPS or min(ends.values()) < ENOUGH:
            assert time.monotonic() - began < MOST_SECONDS, f"{ends} in {swaps[0]} swaps"
            number += 1
            try:
                found = asyncio.run(sources.find("fox", str(inside)))
                check_texts(library.load("fox", found, sources.allowed))
                check_numbers(store.load(number, "fox", Path(found), roots=sources.allowed))
            except EngineError:
                ends["refused"] += 1
            else:
                ends["loaded"] += 1
            store.drop(number)


def check_numbers(adapter: NormalForm) -> None:
    for slices in adapter.deltas.values():
        for delta in slices:
            if delta is not None:
                assert delta.a.eq(1.0).all(), "the weights come from outside"
                assert delta.b.eq(2.0).all(), "the weights or the config come from outside"


def check_texts(tools: TextTools) -> None:
    assert tools.chat.source in ("template of 1.0", "template of the base")
    assert tools.generation_config.temperature == 1.0
    assert tools.tokenizer.special_tokens.get("bos_token") in ("<1.0>", "<s>")
