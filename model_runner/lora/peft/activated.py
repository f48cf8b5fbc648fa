"""Adapters that act from their invocation on (activated LoRA, 2504.12397): what such an adapter may bring.

Before its invocation a request is the base's in everything, so what would change the whole of it is refused, as PEFT
refuses most of it. Knows nothing of where a prompt holds the invocation.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.errors import AdapterError
from model_runner.lora.catalogue import OUTSIDE, Catalogue
from model_runner.lora.peft.config import CONFIG_NAME, PeftConfig
from model_runner.lora.peft.tensor_mapping import TensorMapping

OPTION = "alora_invocation_tokens"
LONGEST = 1024


def check_activated(config: PeftConfig, mappings: Iterable[TensorMapping], catalogue: Catalogue) -> None:
    """Raises AdapterError naming the option or the module, and for an invocation that no prompt could hold."""
    invocation = config.alora_invocation_tokens
    if invocation is None:
        return
    if not 1 <= len(invocation) <= LONGEST:
        raise AdapterError(f"{CONFIG_NAME}: {OPTION} has {len(invocation)} tokens; 1 to {LONGEST} are served")
    vocabulary = catalogue.places[OUTSIDE[0]][0].site.vocabulary
    stranger = next((token for token in invocation if not 0 <= token < vocabulary), None)
    if stranger is not None:
        raise AdapterError(f"{CONFIG_NAME}: {OPTION} has token {stranger}, and the model has 0 to {vocabulary - 1}")
    for option in _whole_of_a_request(config):
        raise AdapterError(f"{CONFIG_NAME}: {option} is not served together with {OPTION}")
    for mapping in mappings:
        if mapping.module.embeds or mapping.has_whole or mapping.has_gain:
            raise AdapterError(f"module {mapping.name}: its change is not served together with {OPTION}")


def _whole_of_a_request(config: PeftConfig) -> list[str]:
    """The options that are set and mean more than A and B."""
    given = {
        "use_dora": config.use_dora,
        f'bias="{config.bias}"': config.bias != "none",
        "modules_to_save": bool(config.modules_to_save),
        "trainable_token_indices": bool(config.trainable_token_indices),
        "target_parameters": bool(config.target_parameters),
    }
    return [option for option, is_set in given.items() if is_set]
