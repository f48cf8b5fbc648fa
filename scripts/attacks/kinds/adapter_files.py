"""Directories of adapters with hostile files. Each load is a 4xx that says why, or serves what the files hold."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fixtures.adapters.mutations import Mutator

from attacks.kind import Broken, kind
from attacks.target import Target

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RIGHT = (200, 400, 403, 404, 413)


def write_adapter(target: Target, name: str, *, template: str | None = None, **config: Any) -> Path:
    """Copies a sound adapter of the demo into the scratch directory, with changed fields of its config."""
    path = target.scratch / name
    shutil.copytree(target.demo / "adapters" / "poet", path, dirs_exist_ok=True)
    if config:
        fields = json.loads((path / CONFIG).read_text()) | config
        (path / CONFIG).write_text(json.dumps(fields))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


async def load(target: Target, name: str, path: Path, *, ask: bool = True) -> int:
    """Loads the directory, asks for a few tokens if it was accepted, and unloads it. Returns the load's status."""
    body = {"lora_name": name, "lora_path": str(path)}
    loaded = await target.call("/load_lora_adapter", body, key="admin", expect=(*RIGHT, 503), seconds=90)
    if loaded.status == 400 and len(loaded.text) > 4000:
        raise Broken(f"{path.name}: the reason has {len(loaded.text)} characters")
    if loaded.status == 200:
        if ask:
            params = {"max_new_tokens": 2, "temperature": 0}
            request = {"input_ids": [9, 10, 11], "lora_path": name, "sampling_params": params}
            await target.call("/generate", request, expect=(200, 400, 503))
        await target.call("/unload_lora_adapter", {"lora_name": name}, key="admin", expect=(200, 503), seconds=90)
    return loaded.status


# ---------------------------------------------------------------------------------------------------------- weights


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Returns header and data of the weights."""
    data = (path / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """Writes weights with this header, which may tell a false `length`."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + data)


def non_finite(path: Path, draw: random.Random) -> None:
    """Makes one weight NaN or infinite."""
    header, data = parts(path)
    name = draw.choice([name for name in header if name != "__metadata__"])
    values = bytearray(data)
    size = {"F32": 4, "F16": 2, "BF16": 2}[header[name]["dtype"]]
    bits = {2: b"\xc0\x7f" if header[name]["dtype"] == "BF16" else b"\x00\x7e", 4: np.float32("nan").tobytes()}[size]
    at = header[name]["data_offsets"][0]
    values[at : at + size] = bits
    put(path, header, bytes(values))


def mutated_header(path: Path, draw: random.Random) -> None:
    """Changes the header as a tree, or as text."""
    header, data = parts(path)
    put(path, Mutator(draw.randrange(1 << 30)).json(header), data)


def mutated_config(path: Path, draw: random.Random) -> None:
    """Changes the config as a tree, or as text."""
    mutator = Mutator(draw.randrange(1 << 30))
    (path / CONFIG).write_bytes(mutator.json(json.loads((path / CONFIG).read_text())))


def false_length(path: Path, draw: random.Random) -> None:
    """Tells a false length of the header, or of a sparse file."""
    header, data = parts(path)
    put(path, header, data, draw.choice([0, 1, 1 << 31, 1 << 40, 1 << 60, (1 << 64) - 1]))
    if draw.random() < 0.3:
        os.truncate(path / WEIGHTS, 1 << 40)


def edit(**fields: Any) -> Callable[[Path, random.Random], object]:
    """Returns a function that changes the config."""
    return lambda path, _: (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | fields))


def write(name: str, text: str) -> Callable[[Path, random.Random], object]:
    """Returns a function that writes a file."""
    return lambda path, _: (path / name).write_text(text)


def link(name: str, to: str) -> Callable[[Path, random.Random], object]:
    """Returns a function that replaces a file by a link."""
    return lambda path, _: ((path / name).unlink(missing_ok=True), (path / name).symlink_to(to))


BROKEN: dict[str, Callable[[Path, random.Random], object]] = {
    "nan": non_finite,
    "header": mutated_header,
    "config": mutated_config,
    "length": false_length,
    "cut": lambda path, draw: os.truncate(path / WEIGHTS, draw.randrange(300_000)),
    "nothing": lambda path, draw: os.truncate(path / draw.choice([WEIGHTS, CONFIG]), 0),
    "absurd rank": edit(r=10**12),
    "alpha 0": edit(lora_alpha=0),
    "endless pattern": edit(target_modules="(([a-z._0-9]+)+)+!"),
    "unknown modules": edit(target_modules=["wq"] * 100_000),
    "pickle": lambda path, _: (path / WEIGHTS).write_bytes(b"\x80\x04}." * 1000),
    "pipe": lambda path, _: ((path / WEIGHTS).unlink(), os.mkfifo(path / WEIGHTS)),
    "device": link(WEIGHTS, "/dev/zero"),
    "device config": link(CONFIG, "/dev/zero"),
    "out of root": link(WEIGHTS, "/etc/passwd"),
    "out of root config": link(CONFIG, "/etc/passwd"),
    "loop": link(WEIGHTS, WEIGHTS),
    "huge config": lambda path, _: os.truncate(path / CONFIG, 1 << 34),
    "deep config": write(CONFIG, "[" * 1_000_000),
    "huge generation config": lambda path, _: (write("generation_config.json", "{}")(path, _),
                                               os.truncate(path / "generation_config.json", 1 << 34)),
    "tokenizer of nothing": write("tokenizer.json", "{}"),
    "tokenizer that is deep": write("tokenizer.json", "[" * 1_000_000),
    "tokenizer device": link("tokenizer.json", "/dev/zero"),
    "template device": link("chat_template.jinja", "/dev/urandom"),
    "broken template": write("chat_template.jinja", "{% for %}" * 1000),
    "directory": lambda path, _: ((path / WEIGHTS).unlink(), (path / WEIGHTS).mkdir()),
}  # fmt: skip


@kind("adapter_files.broken", seconds=300)
async def broken(target: Target, draw: random.Random) -> None:
    """Lying headers, NaN weights, absurd configs, devices, pipes and links out of the root."""
    for which in draw.sample([*BROKEN], 3):
        name = f"broken-{draw.randrange(1 << 40)}"
        path = write_adapter(target, name)
        try:
            await asyncio.to_thread(BROKEN[which], path, draw)
            status = await load(target, name, path)
        except Broken as error:
            raise Broken(f"{which}: {error}") from error
        finally:
            shutil.rmtree(path, ignore_errors=True)
        if status == 200 and which not in ("header", "config", "alpha 0", "broken template"):
            raise Broken(f"an adapter that is broken ({which}) was loaded")


@kind("adapter_files.huge_tokenizer", seconds=120)
async def huge_tokenizer(target: Target, draw: random.Random) -> None:
    """A tokenizer.json of 60 MB beside the adapter: a million tokens, or a tree of nothing."""
    name = f"tokenizer-{draw.randrange(1 << 40)}"
    path = write_adapter(target, name)
    made = json.loads((target.demo / "model" / "tokenizer.json").read_text())
    which = draw.randrange(3)
    if which == 0:
        made["model"]["vocab"] |= {f"token-{n:030}": n + 1536 for n in range(1_000_000)}
        text = await asyncio.to_thread(json.dumps, made)
    elif which == 1:
        text = json.dumps(made)[:-1] + ', "x": [' + "[]," * 20_000_000 + "[]]}"
    else:
        added = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        made["added_tokens"] += [{"id": n + 1536, "content": f"<{n}>", **added} for n in range(400_000)]
        text = await asyncio.to_thread(json.dumps, made)
    (path / "tokenizer.json").write_text(text)
    try:
        await load(target, name, path, ask=False)
    finally:
        shutil.rmtree(path, ignore_errors=True)


NONSENSE: list[dict[str, Any]] = [
    {"temperature": -5}, {"top_p": 7}, {"top_k": -3}, {"min_p": 2}, {"repetition_penalty": 0}, {"temperature": 1e400},
    {"temperature": "hot"}, {"eos_token_id": [-1, 1 << 40]}, {"eos_token_id": "x"}, {"temperature": [[]]},
]  # fmt: skip


@kind("adapter_files.generation_config", seconds=120)
async def generation_config(target: Target, draw: random.Random) -> None:
    """A generation_config.json with values that no request may have: refused at the load."""
    name, nonsense = f"config-{draw.randrange(1 << 40)}", draw.choice(NONSENSE)
    path = write_adapter(target, name)
    (path / "generation_config.json").write_text(json.dumps(nonsense))
    try:
        if await load(target, name, path) == 200:
            raise Broken(f"generation_config {nonsense} was accepted")
    finally:
        shutil.rmtree(path, ignore_errors=True)


@kind("adapter_files.swapped", seconds=120)
async def swapped(target: Target, draw: random.Random) -> None:
    """A link, or a directory above, that is swapped during the load between a place under the root and one outside."""
    name = f"swapped-{draw.randrange(1 << 40)}"
    inside, outside = write_adapter(target, f"{name}-inside"), target.scratch.parent / "outside"
    shutil.copytree(target.demo / "adapters" / "french", outside, dirs_exist_ok=True)
    at, spare = target.scratch / name, target.scratch / f"{name}-spare"
    at.symlink_to(inside)
    over = asyncio.Event()

    def swap() -> None:
        while not over.is_set():
            for to in (outside, inside):
                spare.symlink_to(to)
                os.replace(spare, at)

    swapping = asyncio.ensure_future(asyncio.to_thread(swap))
    try:
        for number in range(5):
            guest = f"{name}-{number}"
            body = {"lora_name": guest, "lora_path": str(at)}
            loaded = await target.call("/load_lora_adapter", body, key="admin", expect=(*RIGHT, 503))
            if loaded.status != 200:
                continue
            params = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
            request = {"input_ids": [9, 10, 11, 300, 301], "sampling_params": params}
            got, right = await target.tokens(guest, request), await target.tokens("poet", request)
            await target.call("/unload_lora_adapter", {"lora_name": guest}, key="admin", expect=(200, 503), seconds=90)
            if got is not None and right is not None and got != right:
                raise Broken(f"a load has read files outside of --lora-root: {got} is not {right}")
    finally:
        over.set()
        await swapping
        for path in (at, spare):
            path.unlink(missing_ok=True)
        shutil.rmtree(inside, ignore_errors=True)
