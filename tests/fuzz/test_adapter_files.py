"""Mutated adapter directories: each is refused in one line, or loaded with the files' numbers, in bounded memory."""

# ruff: noqa: PT017 - a mutated case may be refused, or not

from __future__ import annotations

import contextlib
import json
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter
from fixtures.adapters.mutations import NUMBERS, TEXTS, Mutator
from safetensors import SafetensorError
from safetensors.torch import load

from engine.errors import AdapterError
from model_runner.lora.loading import cpu_limit
from model_runner.lora.normal_form import NormalForm
from model_runner.lora.store import AdapterStore

CASES = 10_000
SITES = random_sites()
TARGETS = ["q_proj", "down_proj"]
SCALING = 2.0
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "fox", plain_tensors(SITES, TARGETS), target_modules=TARGETS)


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "more than 200 MiB"


@pytest.fixture
def store() -> AdapterStore:
    return AdapterStore(SITES, torch.float32, max_rank=None, targets=None)


def attempt(work: Callable[[], Any]) -> Any:
    """Returns the result of `work`, or None if it raises AdapterError with one line; other exceptions fail the test."""
    try:
        return work()
    except AdapterError as error:
        assert error.message.startswith("adapter 'fox': ")
        assert "\n" not in error.message
        assert len(error.message) <= 600
        return None


def header(mutator: Mutator, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the header with one change, mostly in dtype, shape or offsets."""
    if mutator.draw.random() < 0.5:
        return mutator.tree(fields)
    fields = json.loads(json.dumps(fields))
    entry = fields[mutator.draw.choice([name for name in fields if name != "__metadata__"])]
    what = mutator.draw.randrange(5)
    if what == 0:
        entry["dtype"] = mutator.draw.choice(["F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "f32", "U64", ""])
    elif what == 1:
        entry["shape"] = [mutator.draw.choice([0, 1, 4, 24, 96, -4, 1 << 40]) for _ in range(mutator.draw.randrange(4))]
    elif what == 2:
        entry["shape"] = entry["shape"][::-1]
    elif what == 3:
        entry["data_offsets"][mutator.draw.randrange(2)] += mutator.draw.choice([-400, -4, -1, 1, 4, 1 << 50])
    else:
        entry["data_offsets"] = [mutator.number(), mutator.number()]
    return fields


def mutated_file(mutator: Mutator, data: bytes) -> bytes:
    """Returns a safetensors file with a changed header (as JSON, as text, or its length) or other bytes changed."""
    (length,) = struct.unpack("<Q", data[:8])
    head, body = data[8 : 8 + length], data[8 + length :]
    what = mutator.draw.random()
    if what < 0.6:
        head = json.dumps(header(mutator, json.loads(head))).encode("utf-8", "surrogatepass")
    elif what < 0.7:
        head = mutator.json(json.loads(head))
    elif what < 0.8:
        head = mutator.raw(head)
    elif what < 0.85:
        return mutator.raw(data[: mutator.draw.randrange(len(data))])
    elif what < 0.9:
        lies = [0, 1, length - 1, length + 1, len(data), 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1]
        return struct.pack("<Q", mutator.draw.choice(lies)) + data[8:]
    elif what < 0.95:
        return data[: 8 + length] + mutator.raw(body)
    else:
        head += b" " * mutator.draw.choice([1, 8, 1000])
    return struct.pack("<Q", len(head)) + head + body


def compare(adapter: NormalForm, data: bytes) -> None:
    """Asserts that A and B equal those that the safetensors library reads from the file."""
    tensors = load(data)
    for site in SITES:
        for piece, delta in zip(site.slices, adapter.deltas.get(site.name, (None,) * len(site.slices)), strict=True):
            if delta is not None:
                name = f"base_model.model.{site.path}.{piece.module}"
                a, b = (tensors[f"{name}.lora_{half}.weight"].to(torch.float32) for half in "AB")
                assert torch.equal(delta.a, a)
                assert torch.equal(delta.b, (b * SCALING).t())


def test_mutated_weights_load_or_are_refused(root: Path, store: AdapterStore) -> None:
    mutator, sound, loaded = Mutator(31), (root / WEIGHTS).read_bytes(), 0
    for number in range(1, CASES + 1):
        data = mutated_file(mutator, sound)
        (root / WEIGHTS).write_bytes(data)
        adapter = attempt(lambda number=number: store.load(number, "fox", root))  # type: ignore[misc]
        if adapter is not None:
            loaded += 1
            with contextlib.suppress(SafetensorError):  # the library also refuses bad alignment and metadata
                compare(adapter, data)
    assert CASES * 0.01 < loaded < CASES * 0.4, f"{loaded} were loaded: these are no fuzz cases"


LORA = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": TARGETS,
    "base_model_name_or_path": "org/base", "bias": "none", "use_rslora": False, "use_dora": False,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.05,
    "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None,
    "layers_pattern": None, "exclude_modules": None, "revision": None, "megatron_config": None,
}  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    LORA,
    LORA | {"target_modules": r".*\.(q_proj|down_proj)", "exclude_modules": r".*gate_proj"},
    LORA | {"rank_pattern": {"q_proj": 4, r"layers\.\d+\.mlp": 4}, "alpha_pattern": {"q_proj": 8}},
    LORA | {"layers_to_transform": [0, 1], "layers_pattern": "layers", "use_rslora": True},
    LORA | {"target_modules": "all-linear", "r": 512, "lora_bias": True, "use_dora": True},
    LORA | {"trainable_token_indices": [1, 2], "modules_to_save": ["lm_head", "embed_tokens"], "bias": "lora_only"},
    {"peft_type": "ADALORA", "target_r": 4, "init_r": 6, "tinit": 0, "deltaT": 1, "total_step": 9, **LORA},
    {"peft_type": "LOHA", "r": 4, "alpha": 8, "target_modules": TARGETS, "use_effective_conv2d": False},
    {"peft_type": "LOKR", "r": 4, "alpha": 8, "target_modules": TARGETS, "decompose_both": True, "rank_dropout": 0.0},
    {"peft_type": "VERA", "r": 4, "projection_prng_key": 3, "save_projection": True, "target_modules": TARGETS},
    {"peft_type": "IA3", "feedforward_modules": ["down_proj"], "target_modules": TARGETS},
]
PATTERNS = [*TEXTS, "(a|a)*b", "(?P<layer>a)", "\\d{9999999}", "(?i)Q_PROJ", "(?=.)", "\\1", "q_proj|", "x*" * 30]
ENDLESS = ["(.*.*.*.*)*x", "(([a-z._0-9]+)+)+!", "((.|.)*)*\\n"]
PLACES = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")


def config(mutator: Mutator) -> bytes:
    """Draws a changed config; one in five has an odd pattern where module names are matched."""
    fields = mutator.draw.choice(CONFIGS)
    if mutator.draw.random() < 0.8:
        return mutator.json(fields)
    place, pattern = mutator.draw.choice(PLACES), mutator.draw.choice(PATTERNS)
    value: Any = mutator.draw.choice([pattern, [pattern], [pattern, "q_proj"]])
    if place in ("rank_pattern", "alpha_pattern"):
        value = {pattern: mutator.draw.choice([4, 8, *NUMBERS])}
    changes = {place: value} | ({"layers_to_transform": [0]} if place == "layers_pattern" else {})
    return json.dumps(fields | changes).encode("utf-8", "surrogatepass")


def test_mutated_configs_load_or_are_refused(root: Path, store: AdapterStore) -> None:
    mutator, accepted = Mutator(32), 0
    for _ in range(CASES):
        (root / CONFIG).write_bytes(config(mutator))
        accepted += attempt(lambda: store.survey("fox", root)) is not None
    assert CASES * 0.05 < accepted < CASES * 0.8, f"{accepted} were accepted: these are no fuzz cases"


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("place", PLACES)
def test_endless_pattern_is_stopped_by_the_cpu_limit(
    place: str, pattern: str, root: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's `re` has no time limit, so the store limits the processor time of patterns."""
    monkeypatch.setattr(cpu_limit, "SECONDS", 0.3)
    fields = LORA | {"layers_to_transform": [0]} if place == "layers_pattern" else dict(LORA)
    fields[place] = {pattern: 4} if place in ("rank_pattern", "alpha_pattern") else pattern
    if place == "target_modules":
        fields |= {"layers_to_transform": None}
    (root / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match="processor time"):
        store.survey("fox", root)


def test_layers_pattern_without_a_layer_is_refused(root: Path, store: AdapterStore) -> None:
    fields = LORA | {"layers_to_transform": [0], "layers_pattern": "q_proj|"}
    (root / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match="no module is left"):
        store.survey("fox", root)
