"""Activated LoRA (2504.12397): an adapter that acts from its invocation tokens on.

Before the invocation a request is computed by the base model only, so options that change the whole request are
refused, as PEFT refuses most of them. Does not search prompts for the invocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

from engine.errors import AdapterError
from model_runner.lora.files.adapter_config import CONFIG_NAME
from model_runner.lora.target_module import Module, Term
from model_runner.lora.variants.base import Variant

OPTION = "alora_invocation_tokens"

LONGEST_INVOCATION = 1024
"""The most tokens of an invocation."""


class ActivatedLora(Variant, frozen=True, kw_only=True):
    """The option `alora_invocation_tokens`: the adapter acts from the last occurrence of these tokens on."""

    features: ClassVar = {
        "activated": "`alora_invocation_tokens`: the adapter acts from the last invocation in the prompt on; the tokens"
        " before it are the base's, with its KV pages. For LoRA, rsLoRA and `lora_bias` on linears, and not in a mix"
    }
    label: ClassVar = "activated"

    alora_invocation_tokens: list[int] | None = None

    @property
    def is_on(self) -> bool:
        """Whether the config gives invocation tokens, even an empty list."""
        return self.alora_invocation_tokens is not None

    @property
    def invocation(self) -> list[int]:
        """The invocation tokens. The adapter acts from their last occurrence in a prompt on."""
        return self.alora_invocation_tokens or []

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises AdapterError for an invocation that no prompt could hold."""
        if not 1 <= len(self.invocation) <= LONGEST_INVOCATION:
            raise AdapterError(
                f"{CONFIG_NAME}: {OPTION} has {len(self.invocation)} tokens; 1 to {LONGEST_INVOCATION} are served"
            )
        unknown = next((token for token in self.invocation if not 0 <= token < vocabulary), None)
        if unknown is not None:
            raise AdapterError(f"{CONFIG_NAME}: {OPTION} has token {unknown}, and the model has 0 to {vocabulary - 1}")

    def check_beside(self, others: Sequence[Variant]) -> None:
        """Raises AdapterError for options that change the whole of a request."""
        for option in [option for other in others for option in other.whole_request_options]:
            raise AdapterError(f"{CONFIG_NAME}: {option} is not served together with {OPTION}")

    def check_module(self, module: Module, becomes: AbstractSet[Term]) -> None:
        """Raises AdapterError for a change that acts on the whole request: anything but A, B and bias of a linear."""
        if module.embeds or becomes & {"gain", "full weight"}:
            raise AdapterError(f"module {module.target.module}: its change is not served together with {OPTION}")

    def revision(self) -> list[Any]:
        """Returns the invocation tokens, which are not in the tensors."""
        return [["alora", self.invocation]] if self.invocation else []
