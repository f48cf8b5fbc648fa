"""`modules_to_save`: embedding, head and norms whose trained weights PEFT saves in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from model_runner.lora.variants.base import Variant

FULL_WEIGHT = "weight"
"""The module's trained weight in full."""

BASE_WEIGHT = "base_layer.weight"
"""The base's weight, which PEFT saves beside LoRA on an embedding or where the vocabulary was resized."""

SAVED_COPY = "modules_to_save.weight"
"""A second copy of the trained weight, which PEFT saves where the vocabulary was resized."""

ORIGINAL = "original_module.weight"
"""The weight of the module before training, which PEFT saves where the vocabulary was resized. It is not used."""


class SavedModules(Variant, frozen=True, kw_only=True):
    """The option `modules_to_save`: modules that are trained and saved in full."""

    features: ClassVar = {
        "full embedding and head": "`embed_tokens` and `lm_head` in `modules_to_save`, or saved because the vocabulary"
        " was resized: full weights",
        "norms": "`norm`, `input_layernorm` and the like in `modules_to_save`, all norms or some: full weights",
    }

    modules_to_save: list[str] | None = None

    @property
    def is_on(self) -> bool:
        """Whether a module was saved."""
        return bool(self.modules_to_save)

    @property
    def names(self) -> Sequence[str]:
        """The names in `modules_to_save`."""
        return self.modules_to_save or ()

    @property
    def whole_request_options(self) -> Sequence[str]:
        """`modules_to_save`: it acts on the whole request, so it is not served with an activated LoRA."""
        return ["modules_to_save"]

    def means(self, module: str) -> bool:
        """Returns whether `modules_to_save` selects `module`: the name ends with one of `names`, as PEFT matches."""
        return module.endswith(tuple(self.names))
