"""A new PEFT format is one class and one line of the table of formats: its options, tensor names and refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fixtures.adapters.lora_sites import random_sites, write_adapter

from engine.directory import Directory
from engine.errors import AdapterError
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.formats import registry
from model_runner.lora.formats.base import PeftFormat
from model_runner.lora.loading.adapter_reader import AdapterReader
from model_runner.lora.loading.limits import Limits
from model_runner.lora.normal_form import NormalForm
from model_runner.lora.peft import names
from model_runner.lora.store import AdapterStore
from model_runner.lora.target_module import Change, Module, Shape, Term
from model_runner.lora.variants.biases import Biases

SITES = random_sites()
MODULE = "base_model.model.model.layers.{}.self_attn.v_proj"


class Gains(PeftFormat, frozen=True, kw_only=True):
    """A format with only a gain, stored as a logarithm and multiplied by a temperature; biases may be trained."""

    peft_type: ClassVar = "GAINS"
    name: ClassVar = "Gains"
    note: ClassVar = "a gain for every output column"
    becomes: ClassVar = frozenset[Term]({"gain"})
    parts: ClassVar = frozenset({"gains_log.weight"})
    refused_parts: ClassVar = {"gains_in": "gains of inputs"}
    variants: ClassVar = (Biases,)
    harmless: ClassVar = frozenset({"gains_dropout"})
    refused: ClassVar = {"gains_schedule": "scheduled gains"}
    rank_option: ClassVar = ""
    alpha_option: ClassVar = ""

    temperature: float = 1.0

    def scaling(self, alpha: float, rank: int) -> float:
        """Returns the temperature."""
        return self.temperature

    def shapes(self, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """Returns the shape [O] of the logarithms."""
        return {"gains_log.weight": [module.out_features]}

    def rank(self, module: Module, found: Mapping[str, Shape]) -> int:
        """Returns 0, because a gain has no rank."""
        return 0

    def change(self, module: Module, tensors: Mapping[str, torch.Tensor]) -> Change:
        """Returns the gain, exp(temperature * log)."""
        return Change(gain=(tensors["gains_log.weight"] * module.target.scaling).exp())

    def revision(self) -> list[Any]:
        """Returns the temperature, which the revision includes."""
        return [self.temperature]


def clear_caches() -> None:
    """Clears the caches of functions that read the table of formats."""
    for reader in (*vars(registry).values(), names.markers, names.spellings):
        if hasattr(reader, "cache_clear"):
            reader.cache_clear()


@pytest.fixture(autouse=True)
def gains(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adds the format to the table of formats during the test."""
    monkeypatch.setitem(registry.FORMATS, "GAINS", f"{__name__}:Gains")
    clear_caches()
    yield
    monkeypatch.undo()
    clear_caches()


def save(root: Path, spare: str = "", **options: object) -> Path:
    """Writes an adapter of the format; `spare` names an additional tensor that does not belong to it."""
    tensors = {f"{MODULE.format(layer)}.gains_log.fox.weight": torch.full((8,), 0.5) for layer in range(2)}
    if spare:
        tensors[spare] = torch.zeros(8)
    return write_adapter(
        root, tensors, target_modules=["v_proj"], peft_type="GAINS", r=None, lora_alpha=None, **options
    )


def load(root: Path) -> NormalForm:
    return AdapterStore(SITES, torch.float32, max_rank=None, targets=None).load(1, "fox", root)


def test_new_format_becomes_a_gain(tmp_path: Path) -> None:
    hot, cold = (load(save(tmp_path / str(t), temperature=t, gains_dropout=0.1)) for t in (2.0, 0.5))
    assert hot.revision != cold.revision
    assert (hot.rank, hot.footprint.pages, hot.targets) == (0, {"qkv.vectors": 1}, ["v_proj"])
    for layer in range(2):
        *others, delta = hot.deltas[f"layers.{layer}.qkv"]
        assert others == [None, None]
        assert delta is not None
        assert delta.gain is not None
        torch.testing.assert_close(delta.gain, torch.full((8,), 1.0).exp())


def test_new_format_in_reports_and_tables(tmp_path: Path) -> None:
    with Directory(save(tmp_path)) as directory:
        survey = AdapterReader(Catalogue(SITES), torch.float32, Limits()).survey(directory)
    assert (survey.format, survey.dialect) == ("PEFT Gains", "base_model.model.*.gains_log.<name>.weight")
    assert registry.all_formats()[-1] is Gains
    assert registry.refused_options()["gains_schedule"] == "scheduled gains"


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "option by its name": ({"gains_schedule": 3}, "gains_schedule=3 is not supported yet (scheduled gains;"),
    "other format's option": ({"use_dora": True}, "option use_dora=true is no option of this peft_type"),
    "unknown option": ({"gains_tomorrow": 3}, "option gains_tomorrow=3 is unknown"),
    "type of an option": ({"temperature": "hot"}, "$.temperature"),
    "variant's option": ({"bias": "some"}, 'bias="some" is not supported yet'),
    "part by its name": ({"spare": f"{MODULE.format(0)}.gains_in"}, "is not supported (gains of inputs)"),
    "other format's part": ({"spare": f"{MODULE.format(0)}.lora_A.weight"}, "is no part of Gains"),
    "untargeted module": ({"spare": f"{MODULE.format(1)[:-6]}k_proj.gains_log.weight"}, "does not target"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_new_format_refuses(case: str, tmp_path: Path) -> None:
    given, says = REFUSALS[case]
    with pytest.raises(AdapterError) as caught:
        load(save(tmp_path, **given))
    assert says in caught.value.message


def test_lora_refuses_the_new_formats_option(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"option temperature=2.0 is no option of this peft_type"):
        load(write_adapter(tmp_path, {}, temperature=2.0))
