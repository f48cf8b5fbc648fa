"""Activated LoRA as PEFT saves it: the invocation is read, and options that do not fit it are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures.adapters.adapter_zoo import ATTENTION, save
from fixtures.models.tiny_models import VOCAB

from engine.errors import AdapterError
from model_runner.inspect import examine, main, show, sites_of
from model_runner.lora.loading.limits import Limits
from model_runner.lora.site import Site
from model_runner.lora.store import AdapterStore

OPTION = "alora_invocation_tokens"


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    """A base with biases."""
    return tiny_model("llama-bias")


@pytest.fixture(scope="module")
def sites(model: Path) -> list[Site]:
    """The base's sites."""
    return sites_of(model, "float32")[0]


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """`make(bias="all")`: an activated adapter with these options of PEFT's."""

    def made(**options: Any) -> Path:
        fields = {"r": 4, "target_modules": list(ATTENTION), OPTION: [3, 1, 3], **options}
        return save(model, tmp_path / "adapter", peft.LoraConfig(task_type="CAUSAL_LM", **fields))

    return made


def rewrite(root: Path, **fields: object) -> Path:
    """Changes options in the config and leaves the tensors as they are."""
    path = root / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return root


def load(sites: list[Site], root: Path, number: int = 1) -> Any:
    return AdapterStore(sites, torch.float32, max_rank=None, targets=None).load(number, "fox", root)


def test_invocation_is_part_of_the_revision_and_the_report(
    model: Path, sites: list[Site], make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(use_rslora=True)
    adapter = load(sites, root)
    assert adapter.invocation == [3, 1, 3]
    report = examine(root, sites, torch.float32, Limits())
    assert (report.refused, report.invocation, report.revision) == (None, [3, 1, 3], adapter.revision)
    assert report.format == "PEFT activated rank-stabilised LoRA"
    assert "acts         from tokens [3, 1, 3] on" in show(report)
    assert main([str(root), "--model-path", str(model), "--dtype", "float32"]) == 0
    assert "[3, 1, 3]" in capsys.readouterr().out
    other = load(sites, rewrite(root, **{OPTION: [3, 1]}))
    plain = load(sites, rewrite(root, **{OPTION: None}))
    assert (other.invocation, plain.invocation) == ([3, 1], [])
    assert len({adapter.revision, other.revision, plain.revision}) == 3


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([], "has 0 tokens; 1 to 1024"),
        ([1] * 1025, "has 1025 tokens"),
        ([5, VOCAB], f"has token {VOCAB}, and the model has 0 to {VOCAB - 1}"),
        ([-1], "has token -1"),
        ([1.5], OPTION),
        ([True], OPTION),
        (["a"], OPTION),
        (7, OPTION),
    ],
)
def test_impossible_invocation_is_refused(
    tokens: object, says: str, sites: list[Site], make: Callable[..., Path]
) -> None:
    with pytest.raises(AdapterError, match=rf"adapter 'fox'.*{says}") as caught:
        load(sites, rewrite(make(), **{OPTION: tokens}))
    assert OPTION in caught.value.message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bias": "all"}, 'bias="all"'),
        ({"bias": "lora_only"}, 'bias="lora_only"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    ],
)
def test_options_for_the_whole_request_are_refused_by_name(
    options: dict[str, Any], named: str, sites: list[Site], make: Callable[..., Path]
) -> None:
    with pytest.raises(AdapterError, match=rf"{named} is not served together with {OPTION}"):
        load(sites, make(**options))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"use_dora": True}, "use_dora"), ({"target_modules": ["q_proj", "embed_tokens"]}, "module model.embed_tokens")],
)
def test_combinations_that_peft_refuses_are_refused(
    options: dict[str, Any], named: str, sites: list[Site], make: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match="unsupported variant combination"):
        make(**options)
    with pytest.raises(AdapterError, match=rf"{named}.* together with {OPTION}"):
        load(sites, rewrite(make(**options | {OPTION: None}), **{OPTION: [3]}))


def test_head_and_lora_bias_are_served(model: Path, sites: list[Site], make: Callable[..., Path]) -> None:
    report = examine(make(target_modules=["q_proj", "lm_head"], lora_bias=True), sites, torch.float32, Limits(), model)
    assert (report.refused, report.invocation, set(report.ranks)) == (None, [3, 1, 3], {"q_proj", "lm_head"})
