"""Activated LoRA (2504.12397): an adapter that acts from its invocation tokens on.

Before its invocation a request is the base's in everything, so what would change the whole of a request is refused, as
PEFT refuses most of it. Knows nothing of where a prompt holds the invocation.
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
"""Tokens."""


class ActivatedLora(Variant, frozen=True, kw_only=True):
    """The invocation, as tokens."""

    features: ClassVar = {
        "activated": "`alora_invocation_tokens`: the adapter acts from the last invocation in the prompt on; the tokens"
        " before it are the base's, with its KV pages. For LoRA, rsLoRA and `lora_bias` on linears, and not in a mix"
    }
    label: ClassVar = "activated"

    alora_invocation_tokens: list[int] | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is an invocation, even an empty one."""
        return self.alora_invocation_tokens is not None

    @property
    def invocation(self) -> list[int]:
        """The tokens from whose last occurrence in a prompt on the adapter acts."""
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
        """A and B of linears, and a bias beside them, are all that can begin at a token."""
        if module.embeds or becomes & {"gain", "full weight"}:
            raise AdapterError(f"module {module.target.module}: its change is not served together with {OPTION}")

    def revision(self) -> list[Any]:
        """The invocation."""
        return [["alora", self.invocation]] if self.invocation else []
