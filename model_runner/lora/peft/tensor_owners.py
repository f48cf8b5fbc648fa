"""Finds the module that each tensor of a PEFT adapter belongs to, by its name and the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import AdapterError
from model_runner.lora.catalogue import EMBEDDING_AND_HEAD, Catalogue, is_named
from model_runner.lora.files.adapter_config import CONFIG_NAME
from model_runner.lora.files.quoted import quoted_name
from model_runner.lora.files.tensor_file import Entry
from model_runner.lora.peft.config import PeftConfig
from model_runner.lora.peft.names import parse_name
from model_runner.lora.target_module import Target
from model_runner.lora.variants.biases import BIAS, Biases
from model_runner.lora.variants.saved_modules import BASE_WEIGHT, FULL_WEIGHT, ORIGINAL, SAVED_COPY, SavedModules
from model_runner.lora.variants.trained_tokens import TOKENS, TOKENS_BASE, TrainedTokens

PartsByModule = dict[str, dict[str, str]]
"""Tensor names by module, then by part."""


@dataclass(frozen=True, eq=False)
class TensorOwners:
    """Groups the tensors of one adapter by module. Errors are AdapterErrors that name the tensor or the option."""

    entries: Mapping[str, Entry]
    config: PeftConfig
    targets: Mapping[str, Target]
    catalogue: Catalogue

    def group(self) -> PartsByModule:
        """Returns the tensors by module and part. Those of a tied embedding belong to the head too.

        Raises AdapterError for tensors that the config does not cover, and options that lack their tensors.
        """
        owned = self._owned()
        self._check_trained_tokens(owned)
        self._tie(owned)
        self._check_saved_modules(owned)
        return owned

    def _owned(self) -> PartsByModule:
        """Returns the tensors by module and part, before the head is tied to the embedding."""
        owned: PartsByModule = {}
        for tensor in self.entries:
            name = parse_name(tensor, self.catalogue)
            self._check_belongs(tensor, name.module, name.part)
            parts = owned.setdefault(name.module, {})
            if name.part in parts:
                raise AdapterError(
                    f"tensors {quoted_name(parts[name.part])} and {quoted_name(tensor)} are the same part of one module"
                )
            parts[name.part] = tensor
        for parts in owned.values():
            if SAVED_COPY in parts and FULL_WEIGHT not in parts:
                parts[FULL_WEIGHT] = parts.pop(SAVED_COPY)
        return owned

    def _check_belongs(self, tensor: str, module: str, part: str) -> None:
        """Raises AdapterError for a tensor that the config does not cover."""
        if part == BIAS:
            self._check_bias(tensor, module)
            return
        if self._is_full_weight(module, part):
            return
        if part in (FULL_WEIGHT, BASE_WEIGHT, SAVED_COPY, ORIGINAL):
            raise AdapterError(
                f"tensor {quoted_name(tensor)} replaces a whole module; served are {', '.join(EMBEDDING_AND_HEAD)}"
                " and norms in modules_to_save"
            )
        if part not in self.config.format.parts | self.config.required_parts:
            raise AdapterError(f"tensor {quoted_name(tensor)} is no part of {self.config.name}; nothing would use it")
        if module not in self.targets:
            raise AdapterError(f"tensor {quoted_name(tensor)}: {CONFIG_NAME} does not target {module}")

    def _check_bias(self, tensor: str, module: str) -> None:
        if module in self.catalogue.norms:
            raise AdapterError(f"tensor {quoted_name(tensor)}: {module} of the model has no bias")
        biases = self.config.variant(Biases)
        if biases is None or not biases.trains_base:
            raise AdapterError(f"tensor {quoted_name(tensor)}: {CONFIG_NAME} says bias='none'")

    def _is_full_weight(self, module: str, part: str) -> bool:
        """Returns whether the part is a full weight that the module may have."""
        saved, tokens = self.config.variant(SavedModules), self.config.variant(TrainedTokens)
        if part == BASE_WEIGHT and module in self.targets:
            return True
        if module in EMBEDDING_AND_HEAD:  # the weight was trained, or saved because the vocabulary was resized
            if part in (TOKENS, TOKENS_BASE):
                return tokens is not None and bool(tokens.tokens_of(module))
            return part == FULL_WEIGHT or (part in (SAVED_COPY, ORIGINAL) and saved is not None)
        is_saved_norm = module in self.catalogue.norms and saved is not None and saved.means(module)
        return part in (FULL_WEIGHT, SAVED_COPY) and is_saved_norm

    def _check_trained_tokens(self, owned: PartsByModule) -> None:
        """Raises AdapterError for a module of `trainable_token_indices` that has no trained rows in the files."""
        variant = self.config.variant(TrainedTokens)
        for trained in variant.modules if variant is not None else ():
            if not any(is_named(module, trained) for module in owned if TOKENS in owned[module]):
                raise AdapterError(
                    f"{CONFIG_NAME}: trainable_token_indices means {trained}, which has no tensor for them"
                )

    def _check_saved_modules(self, owned: PartsByModule) -> None:
        """Raises AdapterError for a name in `modules_to_save`, or a norm that it selects, without a tensor."""
        variant = self.config.variant(SavedModules)
        if variant is None:
            return
        for saved in variant.names:
            if not any(module.endswith(saved) for module in owned if FULL_WEIGHT in owned[module]):
                raise AdapterError(f"{CONFIG_NAME}: modules_to_save names {saved!r}, which has no tensor that fits")
        for module in self.catalogue.norms:
            if module not in owned and variant.means(module):
                raise AdapterError(f"{CONFIG_NAME}: modules_to_save means {module} too, which has no tensor")

    def _tie(self, owned: PartsByModule) -> None:
        """Gives a tied head without its own tensors the embedding's trained tokens or resized weight."""
        embedding, head = EMBEDDING_AND_HEAD
        parts = owned.get(embedding, {})
        if head not in self.catalogue.refs or head in owned or head in self.targets:
            return
        site = self.catalogue.refs[head][0].site
        if not site.tied:
            return
        if TOKENS in parts:
            owned[head] = {part: parts[part] for part in (TOKENS, TOKENS_BASE) if part in parts}
        elif BASE_WEIGHT in parts and self.entries[parts[BASE_WEIGHT]].shape[:1] != [site.vocabulary]:
            owned[head] = {FULL_WEIGHT: parts[BASE_WEIGHT]}
