"""Every option of PEFT's configs is used, known to be harmless, or refused with an error that names it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
from fixtures.adapters.refusals import refusal

from model_runner.lora.formats import registry
from model_runner.lora.peft.config import PROVENANCE, PeftOptions
from model_runner.model.decoders.decoder import Decoder

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


pytestmark = [
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),  # AdaLoRA's are module names
]


CONFIGS = {
    "LORA": peft.LoraConfig,
    "ADALORA": peft.AdaLoraConfig,
    "LOHA": peft.LoHaConfig,
    "LOKR": peft.LoKrConfig,
}


OTHER_OPTIONS = ("use_tomorrow", "use_dora", "init_r", "use_rslora", "alpha")
"""Options that some formats have, and one that no format has."""


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_option_of_pefts_config_is_classified(kind: str) -> None:
    form = registry.find_format(kind)
    common, refused = frozenset(PeftOptions.__struct_fields__), registry.refused_options()
    known = form.used_options() | form.harmless | common | PROVENANCE | refused.keys()
    strangers = {field.name for field in dataclasses.fields(CONFIGS[kind])} - known
    if kind == "ADALORA":  # LoRA's options that AdaLoRA's layers ignore are refused when they are set
        strangers -= {"use_dora", "lora_bias", "target_parameters", "alora_invocation_tokens"}
    assert strangers == set()
    sorts = [form.used_options(), form.harmless, common, PROVENANCE, frozenset(refused)]
    assert sum(map(len, sorts)) == len(frozenset().union(*sorts)), "an option is of two sorts"


def _unserved_options() -> list[tuple[str, str]]:
    """Returns the pairs (format, option) of the options that the format does not have."""
    options = [*registry.refused_options(), *OTHER_OPTIONS]
    had = {kind: registry.find_format(kind).used_options() | registry.find_format(kind).harmless for kind in CONFIGS}
    return [(kind, option) for option in options for kind in CONFIGS if option not in had[kind]]


@pytest.mark.parametrize(("kind", "option"), _unserved_options())
def test_unserved_option_is_refused_by_name(
    kind: str, option: str, decoder: Decoder, copy: Callable[[str], Path]
) -> None:
    root = copy({"LORA": "lora", "ADALORA": "adalora", "LOHA": "loha", "LOKR": "lokr"}[kind])
    path = root / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: 7}))
    assert re.search(rf"\b{option}=7\b", refusal(decoder.sites, root))
