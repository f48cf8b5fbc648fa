"""`trainable_token_indices`: some tokens have their own trained rows in the embedding, the head or both.

    [5, 9]                         the embedding, and the head where it is tied to it
    {"lm_head": [5]}               by module, named in full or by its end after a dot

A vocabulary of another size than the base's belongs to the same feature but needs no option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from engine.errors import AdapterError
from model_runner.lora.catalogue import is_named
from model_runner.lora.files.adapter_config import CONFIG_NAME
from model_runner.lora.target_module import Term
from model_runner.lora.variants.base import Variant

TOKENS = "token_adapter.trainable_tokens_delta"
"""The part with the rows of the trained tokens, which replace the base's rows."""

TOKENS_BASE = "token_adapter.base_layer.weight"
"""The whole matrix, in which TOKENS replaces rows. PEFT saves it where the vocabulary was resized."""


class TrainedTokens(Variant, frozen=True, kw_only=True):
    """The option `trainable_token_indices`, as PEFT writes it."""

    features: ClassVar = {
        "added tokens": "a vocabulary larger or smaller than the base's, and `trainable_token_indices`: full weights of"
        " embedding and head, which contain all that was trained of them",
    }
    parts: ClassVar = frozenset({TOKENS, TOKENS_BASE})
    becomes: ClassVar = frozenset[Term]({"full weight"})

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    @property
    def is_on(self) -> bool:
        """Whether a token was trained."""
        return bool(self.trainable_token_indices)

    @property
    def whole_request_options(self) -> Sequence[str]:
        """`trainable_token_indices`: it acts on the whole request, so it is not served with an activated LoRA."""
        return ["trainable_token_indices"]

    @property
    def modules(self) -> Sequence[str]:
        """The modules that must have rows of trained tokens; a list of tokens refers to the embedding."""
        indices = self.trainable_token_indices
        return list(indices) if isinstance(indices, dict) else ["embed_tokens"] if indices else []

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Returns the tokens that have their own rows in `module`, in the order of the rows."""
        indices = self.trainable_token_indices or []
        if isinstance(indices, list):
            return tuple(indices)
        found = [tokens for name, tokens in indices.items() if is_named(module, name)] or list(indices.values())
        return tuple(found[0]) if len(found) == 1 else ()

    def check_tokens(self, module: str, vocabulary: int) -> None:
        """Raises AdapterError for tokens that are given twice or are not in the vocabulary."""
        tokens = self.tokens_of(module)
        if len(set(tokens)) < len(tokens) or not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise AdapterError(
                f"{CONFIG_NAME}: trainable_token_indices are not different tokens of a vocabulary of {vocabulary}"
            )

    def revision(self) -> list[Any]:
        """Returns the token ids, because the tensors hold only their rows."""
        return [self.trainable_token_indices]
