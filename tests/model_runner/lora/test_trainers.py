"""Adapters as trainers leave them: those that PEFT serves give PEFT's tokens, and the advice of each refusal works."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.adapter_zoo import save
from fixtures.adapters.refusals import refusal
from fixtures.adapters.resident import attach_adapters
from fixtures.adapters.trainers.advice import Followed, follow
from fixtures.adapters.trainers.corpus import KINDS, Case, corpus
from fixtures.adapters.trainers.quirks import QUIRKS, save_for, spoil
from fixtures.models.drive import Driver
from fixtures.models.oracle import MARGIN
from fixtures.models.tiny_models import VOCAB, build

from model_runner.config import read_model_config
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.load import load_model

FAMILIES = ("llama3", "qwen2", "mistral", "qwen3", "phi3", "qwen3-moe")
TOKENS = 5
PROMPT = [random.Random(seed).randrange(VOCAB) for seed in range(30, 41)]


class Peft:
    """PEFT on one base: the logits of one adapter at a time."""

    def __init__(self, model: Path, first: Path) -> None:
        import peft
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.model: Any = peft.PeftModel.from_pretrained(base, str(first), adapter_name="first").eval()

    @torch.inference_mode()
    def logits(self, root: Path, ids: list[int]) -> torch.Tensor:
        """Returns the logits [len(ids), vocabulary] of the adapter in `root`, which is loaded and removed again."""
        self.model.load_adapter(str(root), adapter_name="other")
        self.model.set_adapter("other")
        found: torch.Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        self.model.delete_adapter("other")
        return found


def agree(tokens: list[int], logits: torch.Tensor) -> int:
    """Asserts that greedy tokens are those of `logits`, up to the first near tie; returns how many were compared."""
    best = logits[len(PROMPT) - 1 : len(PROMPT) - 1 + TOKENS].topk(2)
    for step, (values, indices) in enumerate(zip(best.values, best.indices, strict=True)):
        if float(values[0] - values[1]) < MARGIN:
            return step
        assert tokens[step] == int(indices[0]), step
    return TOKENS


@pytest.mark.parametrize("family", FAMILIES)
def test_directories_of_trainers_give_pefts_tokens(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of what is in these configs on purpose
        kinds = [kind for kind in KINDS if family != "qwen3-moe" or kind != "dora"]  # PEFT has no DoRA on experts
        cases = list(corpus(model, tmp_path, kinds))
        decoder = load_model(model, read_model_config(model), device=torch.device("cpu"), dtype=torch.float32)
        lora = attach_adapters(decoder, {case.name: case.root for case in cases})
        lanes = [0, *range(1, len(cases) + 1)]
        plain, *served = Driver(decoder, lora=lora, pages=1024).greedy([PROMPT] * len(lanes), TOKENS, lanes=lanes)
        peft, known = Peft(model, cases[0].oracle), dict[Path, torch.Tensor]()
        compared, differ = [], 0
        for case, tokens in zip(cases, served, strict=True):
            compared.append(_compare(case, tokens, peft, known))
            differ += tokens != plain
    assert min(compared) >= 2
    assert differ == len(cases) >= 40, "an adapter changes nothing"  # with six families more than two hundred


def _compare(case: Case, tokens: list[int], peft: Peft, known: dict[Path, torch.Tensor]) -> int:
    """Compares the tokens with PEFT's on the case's oracle, whose logits are computed once if it serves several."""
    logits = known.get(case.oracle)
    if logits is None or logits.shape[0] == 0:
        logits = known[case.oracle] = peft.logits(case.oracle, [*PROMPT, *tokens[:-1]])
    try:
        return agree(tokens, logits)
    except AssertionError as error:
        raise AssertionError(f"{case.name}: {tokens} are not PEFT's") from error


EXPERT_TARGETS: dict[str, dict[str, list[str] | str]] = {
    "qwen3-moe": {"expression": r".*\.(q_proj|gate_proj|up_proj|down_proj)", "all": "all-linear"},
    "mixtral": {"expression": r".*\.(q_proj|w1|w2|w3|gate)", "list": ["q_proj", "w1", "w2", "w3", "wq"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", EXPERT_TARGETS)
def test_targets_that_peft_writes_for_experts(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT resolves an expression on a mixture of experts into lists of modules and parameters."""
    import peft

    model = tiny_model(family)
    roots = {}
    for name, targets in EXPERT_TARGETS[family].items():
        config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", target_modules=targets)
        roots[name] = save(model, tmp_path / name, config, fitting=False)
    decoder = decoder_of(model)
    lora = attach_adapters(decoder, roots)
    served = Driver(decoder, lora=lora).greedy([PROMPT] * len(roots), TOKENS, lanes=range(1, len(roots) + 1))
    for root, tokens in zip(roots.values(), served, strict=True):
        assert agree(tokens, PeftAlone(model, root).logits([*PROMPT, *tokens[:-1]])) >= 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUIRKS)
def test_advice_of_a_refusal_works(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The adapter, mended as the refusal says, gives the tokens that PEFT gives for the adapter as it was."""
    quirk = QUIRKS[name]
    model = trained_on = tiny_model(quirk.family)
    if quirk.trained_on:
        trained_on = build(quirk.family, tmp_path / "larger", seed=1, **quirk.trained_on)
    root = save_for(quirk, trained_on, tmp_path / "fox")
    whole = Path(shutil.copytree(root, tmp_path / "whole"))
    spoil(quirk, root)
    followed = follow(refusal(decoder_of(model).sites, root), root, model, trained_on)
    tokens = _greedy(followed)
    assert agree(tokens, PeftAlone(trained_on, whole).logits([*PROMPT, *tokens[:-1]])) >= 2
    assert tokens != _greedy(Followed(trained_on, None))


def _greedy(served: Followed) -> list[int]:
    """Returns the tokens of what is served: an adapter on a model, or the model alone."""
    decoder = decoder_of(served.model)
    if served.root is None:
        return Driver(decoder).greedy([PROMPT], TOKENS)[0]
    lora = attach_adapters(decoder, {"fox": served.root})
    return Driver(decoder, lora=lora).greedy([PROMPT], TOKENS, lanes=[1])[0]


def decoder_of(model: Path) -> Decoder:
    """Returns the model as the runner loads it."""
    return load_model(model, read_model_config(model), device=torch.device("cpu"), dtype=torch.float32)


class PeftAlone:
    """PEFT with one adapter, which may change the base's weights."""

    def __init__(self, model: Path, root: Path) -> None:
        import peft
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.model: Any = peft.PeftModel.from_pretrained(base, str(root)).eval()

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Returns the logits [len(ids), vocabulary]."""
        found: torch.Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        return found
