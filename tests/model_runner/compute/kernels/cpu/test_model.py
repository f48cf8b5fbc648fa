"""The model with every kernel compiled, against transformers + PEFT in float32, and each row against a poisoned run.

Calls of kernels are counted, because a test that never called a kernel would prove nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from fixtures.adapters.adapter_zoo import ZOO, merged, save
from fixtures.adapters.resident import attach_adapters
from fixtures.models.drive import Driver, Row
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB

from model_runner.compute.kernels.cpu.compilation import compiler
from model_runner.compute.kernels.cpu.functions.registry import SPECS
from model_runner.compute.kernels.cpu.functions.spec import Argument, Kernel, KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.config import read_model_config
from model_runner.model.load import load_model

FAMILY = "qwen2"
"""A family that calls every kernel: plain norms, SiLU, grouped heads without norms. All formats fit its biases."""

N = 6
LONG = 41
LENGTHS = (1, 5, 20, LONG)
MIXES: list[dict[str, float]] = [
    {"lora": 0.5, "rslora": -0.75},
    {"dora rslora": 0.5, "lora": 1.0, "lokr full": 0.25},
    {"head": 0.5, "lokr": 2.0, "embedding": 0.5},
]

pytestmark = [
    pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]


@dataclass(frozen=True)
class World:
    """A model, an adapter of every format, prompts for the base, each adapter and each mix, and the oracle's tokens."""

    path: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    lanes: list[int]
    expected: list[list[int]]

    def driver(self, kernels: KernelSet | None = None, names: Sequence[str] | None = None) -> Driver:
        """Drives a newly loaded model. `names`: the adapters in lanes 1, 2, ... (None: all, and the mixes)."""
        decoder = load_model(self.path, read_model_config(self.path), device=torch.device("cpu"), dtype=torch.float32)
        adapters = self.adapters if names is None else {name: self.adapters[name] for name in names}
        lora = attach_adapters(decoder, adapters, MIXES if names is None else ())
        return Driver(decoder, lora=lora, pages=900, kernels=kernels)

    def wrong(self, found: list[list[int]]) -> set[str]:
        """Returns the adapters and mixes whose tokens are not the oracle's."""
        names = ["base", *self.adapters, *map(str, MIXES)]
        triples = zip(self.lanes, found, self.expected, strict=True)
        return {names[lane] for lane, one, other in triples if one != other}


class CountingKernels(KernelSet):
    """Hands out the first `known` of the compiled kernels (None: all), and counts the calls of each."""

    def __init__(self, compiled: KernelSet, wanted: Sequence[KernelKey], known: int | None = None) -> None:
        super().__init__("before_serving")
        self.wanted, self.known = list(wanted), len(wanted) if known is None else known
        self.calls: Counter[KernelKey] = Counter()
        self._compiled = compiled

    def get(self, key: KernelKey) -> Kernel | None:
        kernel = self._compiled.get(key)
        if kernel is None or key not in self.wanted[: self.known]:
            return None

        def counted(*arguments: Argument) -> None:
            self.calls[key] += 1
            kernel(*arguments)

        return counted

    def uncalled(self) -> list[KernelKey]:
        return [key for key in self.wanted if not self.calls[key]]


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    path, root = tiny_model(FAMILY), tmp_path_factory.mktemp("compiled-world")
    adapters = {name: save(path, root / name, config(), seed) for seed, (name, config) in enumerate(ZOO.items())}
    oracles = [(Oracle(path), None), *((Oracle(path, {name: adapters[name]}), name) for name in adapters)]
    oracles += [(Oracle(mixed), None) for mixed in write_mixes(path, adapters, root)]
    draw, prompts, lanes, expected = random.Random(11), [], [], []
    for lane, (oracle, name) in enumerate(oracles):
        for number in range(3 if lane in (1, len(oracles) - 1) else 1):  # several rows of one lane
            prompt: list[int] = []
            while not prompt or not oracle.is_unambiguous(prompt, N, name):
                prompt = [draw.randrange(VOCAB) for _ in range(LENGTHS[(lane + number) % len(LENGTHS)])]
            prompts.append(prompt)
            lanes.append(lane)
            expected.append(oracle.greedy(prompt, N, name))
    return World(path, adapters, prompts, lanes, expected)


def write_mixes(path: Path, adapters: dict[str, Path], root: Path) -> list[Path]:
    """Saves a model for each mix: the base plus the weighted sum of each adapter's changes."""
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    own = {key: value.clone() for key, value in base.state_dict().items()}
    changed = {name: merged(path, adapters[name]) for name in {name for mix in MIXES for name in mix}}
    paths = []
    for number, mix in enumerate(MIXES):
        moved = {key: sum(s * (changed[name][key] - value) for name, s in mix.items()) for key, value in own.items()}
        base.load_state_dict({key: value + moved[key] for key, value in own.items()})
        base.save_pretrained(root / f"mix{number}")
        paths.append(root / f"mix{number}")
    return paths


@pytest.fixture(scope="module")
def compiled(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[KernelSet, list[KernelKey]]:
    """Compiles the kernels that the model calls, which are all kernels that exist. Returns the set and their keys."""
    wanted = world.driver().wanted_kernels()
    assert {key.name for key in wanted} == set(SPECS)
    kernels = KernelSet("before_serving", tmp_path_factory.mktemp("compiled") / "cache")
    kernels.request(wanted)
    assert [key for key in wanted if kernels.get(key) is None] == []
    return kernels, wanted


SCHEDULES: dict[str, dict[str, int]] = {
    "together": {},
    "in chunks, one row after another": {"chunk": 9, "late": 1},
    "decodes beside whole prefills": {"late": 2},
}


def test_every_format_in_one_batch(world: World, compiled: tuple[KernelSet, list[KernelKey]]) -> None:
    counted = CountingKernels(*compiled)
    first = world.driver(counted)
    for schedule, options in SCHEDULES.items():
        driver = Driver(first.decoder, lora=first.lora, pages=900, kernels=counted)
        found = driver.greedy(world.prompts, N, lanes=world.lanes, **options)
        assert world.wrong(found) == set(), schedule
    assert counted.uncalled() == []


class SwappingDriver(Driver):
    """Starts without kernels; after `late` steps one more kernel is available in each step."""

    late = 4
    counted: CountingKernels

    def step(self, chunks: Sequence[tuple[Row, int]]) -> torch.Tensor:
        if self.late:
            self.late -= 1
        else:
            self.use_kernels(self.counted)
            self.counted.known += 1
        return super().step(chunks)


def test_kernels_that_arrive_mid_stream_change_no_token(
    world: World, compiled: tuple[KernelSet, list[KernelKey]]
) -> None:
    kernels, wanted = compiled
    for order in (wanted, wanted[::-1]):
        counted = CountingKernels(kernels, order, known=0)
        plain = world.driver()
        driver = SwappingDriver(plain.decoder, lora=plain.lora, pages=900)
        driver.counted = counted
        found = driver.greedy(world.prompts, N, lanes=world.lanes, chunk=9, late=2)
        assert world.wrong(found) == set()
        assert counted.uncalled() == []


NAMES = ("lora", "dora", "dora rslora", "rslora", "lokr full", "head", "bias all", "lokr thin")
"""The adapters in lanes 1, 2, ...; each has 1, 2 or 4 pages in a group."""

PLACED = [(0, 20), (1, 5), (2, LONG), (3, 1), (3, 20), (4, 1), (5, 2), (6, LONG), (7, 5), (8, 1), (1, 3), (0, 1)]
"""Lane and prompt length of each row."""

STEPS = [
    {row: PLACED[row][1] for row in range(11)},  # prefills of all rows but the last
    {**dict.fromkeys(range(10), 1), 11: 1},  # a new row, and one row without tokens
    {0: 1, 2: 7, 3: 1, 4: 33, 5: 1, 7: 6, 8: 1, 9: 2, 10: 1},  # decodes beside chunks of all sizes
    {1: 1, 3: 1, 6: 1},  # few rows
    {4: 1},
]
"""For each step, the number of tokens by row."""


def run_steps(
    world: World, kernels: KernelSet, plant: Callable[[Driver, list[Row], int], None] | None = None
) -> dict[tuple[int, int], torch.Tensor]:
    """Returns the logits by (step, row). `plant` is called before each step and may poison caches or weights."""
    driver, draw = world.driver(kernels, NAMES), random.Random(2)
    total = [sum(step.get(row, 0) for step in STEPS) for row in range(len(PLACED))]
    rows = [Row([draw.randrange(VOCAB) for _ in range(total[row])], lane) for row, (lane, _) in enumerate(PLACED)]
    found = {}
    for number, step in enumerate(STEPS):
        if plant is not None:
            plant(driver, rows, number)
        logits = driver.step([(rows[row], length) for row, length in step.items()])
        parts = logits.split(list(step.values()))
        found |= {(number, row): part for row, part in zip(step, parts, strict=True)}
    return found


def changed(
    clean: dict[tuple[int, int], torch.Tensor], found: dict[tuple[int, int], torch.Tensor]
) -> set[tuple[int, int]]:
    """Returns the (step, row) pairs whose logits are not bit-equal in `clean` and `found`."""
    return {place for place, logits in clean.items() if not torch.equal(found[place], logits)}


def test_poisoned_free_pages_reach_no_row(world: World, compiled: tuple[KernelSet, list[KernelKey]]) -> None:
    def plant(driver: Driver, rows: list[Row], number: int) -> None:
        owned = {page for row in rows for page in row.pages}
        for layer in range(driver.decoder.config.num_layers):
            for cache in driver.pool.layer(layer):
                cache[[page for page in range(len(cache)) if page not in owned]] = torch.nan

    counted = CountingKernels(*compiled)
    clean = run_steps(world, counted)
    assert all(torch.isfinite(logits).all() for logits in clean.values())
    assert changed(clean, run_steps(world, counted, plant)) == set()
    assert counted.uncalled() == []


@pytest.mark.parametrize("row", range(len(PLACED)))
def test_poisoned_cache_stays_with_its_row(world: World, compiled: tuple[KernelSet, list[KernelKey]], row: int) -> None:
    def plant(driver: Driver, rows: list[Row], number: int) -> None:
        for layer in range(driver.decoder.config.num_layers):
            for cache in driver.pool.layer(layer):
                cache[rows[row].pages] = torch.nan

    kernels = CountingKernels(*compiled)
    found = run_steps(world, kernels, plant)
    later = {(number, row) for number, step in enumerate(STEPS) if row in step and number > row // 11}
    assert changed(run_steps(world, kernels), found) == later
    assert all(torch.isnan(found[place]).all() for place in later)


@pytest.mark.parametrize("lane", range(1, len(NAMES) + 1))
def test_poisoned_weights_stay_with_their_lane(
    world: World, compiled: tuple[KernelSet, list[KernelKey]], lane: int
) -> None:
    def plant(driver: Driver, rows: list[Row], number: int) -> None:
        pages = driver.lora.pages
        for name, pool in pages.pools.items():
            group = next(site.group for site in pages.sites if site.name == name)
            for page, _ in pages.lanes[lane].get(group, ()):
                pool.a_PSRI[page] = pool.b_PRO[page] = torch.nan

    kernels = CountingKernels(*compiled)
    found = run_steps(world, kernels, plant)
    own = {(number, row) for number, step in enumerate(STEPS) for row in step if PLACED[row][0] == lane}
    assert changed(run_steps(world, kernels), found) == own
    assert all(torch.isnan(found[place]).all() for place in own)
