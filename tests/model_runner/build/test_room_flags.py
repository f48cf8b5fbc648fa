"""An adapter that does not fit is refused with the flags that make room for it: a launch with these flags serves it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.adapters.adapter_zoo import save
from fixtures.adapters.expert_adapters import make_expert_adapter
from fixtures.models.launched import launch, load_here
from fixtures.models.tiny_models import make_adapter

from engine.errors import AdapterError, ConfigError

Make = Callable[[Path, Path], Path]


def _zoo(**options: Any) -> Make:
    import peft

    return lambda model, out: save(model, out, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options))


def _plain(*targets: str, r: int = 4) -> Make:
    return lambda model, out: make_adapter(model, out, r=r, targets=targets)


def _experts(*targets: str, r: int = 4) -> Make:
    return lambda model, out: make_expert_adapter(model, out, targets, r=r)


CASES: dict[str, tuple[str, str, Make]] = {
    "head under all": ("qwen2", "--lora-target-modules all", _zoo(target_modules=["lm_head", "q_proj"])),
    "embedding with a high rank": (
        "qwen2",
        "",
        _zoo(target_modules=["embed_tokens", "o_proj"], rank_pattern={"o_proj": 90}),
    ),
    "rank and module": ("llama3", "--max-lora-rank 8 --lora-target-modules q_proj", _plain("o_proj", r=20)),
    "biases": (
        "llama-bias",
        "--no-enable-lora-bias --max-lora-rank 8",
        _zoo(target_modules=["q_proj"], lora_bias=True),
    ),
    "norms": ("llama3", "--lora-target-modules q_proj", _zoo(target_modules=["q_proj"], modules_to_save=["norm"])),
    "whole head and module": (
        "qwen2",
        "--lora-target-modules v_proj",
        _zoo(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ),
    "experts under all": ("qwen3-moe", "--lora-target-modules all", _experts("gate_proj", "down_proj", "q_proj")),
    "embedding under nothing": ("qwen2", "", _zoo(target_modules=["embed_tokens"])),
    "rank above two pages": ("llama3", "", _plain("o_proj", r=200)),
    "whole head": ("qwen2", "", _zoo(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "experts of Mixtral": ("mixtral", "", _experts("w1", "w2", "w3", r=3)),
    "experts beside names": ("mixtral", "--lora-target-modules q_proj", _experts("w1", "q_proj")),
    "experts of high rank": ("mixtral", "--lora-target-modules all --max-lora-rank 8", _experts("w2", r=24)),
}


@pytest.mark.parametrize("case", CASES)
def test_flags_of_the_refusal_make_room(case: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    family, flags, make = CASES[case]
    model = tiny_model(family)
    root = make(model, tmp_path / "fox")
    with launch(model, ["--enable-lora", *flags.split()]) as runner:
        refused = load_here(runner, "fox", root) or "it is served"
    advice = re.fullmatch(r"adapter 'fox'.*: launch with (--.*)", refused)
    assert advice, refused
    with launch(model, ["--enable-lora", *flags.split(), *shlex.split(advice[1])]) as runner:
        assert load_here(runner, "fox", root) is None


def test_flags_take_up_what_adapters_at_start_need(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The advice for a later adapter keeps the adapters that were given at start."""
    model = tiny_model("llama3")
    first = make_adapter(model, tmp_path / "first", r=8, targets=["q_proj", "down_proj"])
    later = make_adapter(model, tmp_path / "later", r=70, targets=["o_proj"])
    given = ["--lora-paths", f"first={first}"]
    with launch(model, given) as runner:
        error = load_here(runner, "later", later) or ""
    advice = error.partition(": launch with ")[2]
    assert advice == "--lora-target-modules q_proj down_proj o_proj --max-lora-rank 70"
    with launch(model, [*given, *advice.split()]) as runner:
        assert load_here(runner, "later", later) is None


def test_start_up_adapter_on_experts_makes_room_beside_all(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("qwen3-moe")
    root = make_expert_adapter(model, tmp_path / "fox", ["gate_proj", "q_proj"])
    with launch(model, ["--lora-target-modules", "all", "--lora-paths", f"fox={root}"]) as runner:
        assert runner.capacity.rank_pages["experts"] > 0
    with launch(model, ["--enable-lora", "--lora-target-modules", "all"]) as runner:
        assert "experts" not in runner.capacity.rank_pages
    with launch(model, ["--lora-target-modules", "all", "gate_proj", "embed_tokens"]) as runner:
        assert min(runner.capacity.rank_pages[group] for group in ("experts", "embed", "qkv", "down")) > 0


def test_names_of_fused_linears_mean_their_parts(tiny_model: Callable[[str], Path]) -> None:
    with launch(tiny_model("llama3"), ["--lora-target-modules", "qkv_proj", "gate_up_proj"]) as runner:
        assert runner.capacity.lora_targets == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    with (
        pytest.raises(ConfigError, match="this model has no such module"),
        launch(tiny_model("llama3"), ["--lora-target-modules", "all", "w1"]),
    ):
        pass


def test_start_up_adapter_beyond_the_flags_names_them(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("llama3")
    root = make_adapter(model, tmp_path / "fox", r=20, targets=["o_proj"])
    given = ["--lora-paths", f"fox={root}", "--max-lora-rank", "8", "--lora-target-modules", "q_proj"]
    with pytest.raises(AdapterError) as caught, launch(model, given):
        pass
    advice = caught.value.message.partition(": launch with ")[2]
    with launch(model, [*given, *advice.split()]) as runner:
        assert runner.capacity.max_lora_rank == 20
