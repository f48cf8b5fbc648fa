"""Finds the module that each tensor of a PEFT adapter belongs to, by its name and the config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import AdapterError
from model_runner.lora.catalogue import EMBEDDING_AND_HEAD, Catalogue, is_named, leaf
from model_runner.lora.files.adapter_config import CONFIG_NAME
from model_runner.lora.files.advice import MERGE, with_option, without_tensors
from model_runner.lora.files.quoted import quoted_name, some
from model_runner.lora.files.tensor_file import Entry
from model_runner.lora.peft.config import BY_TENSORS, PeftConfig
from model_runner.lora.peft.names import parse_name
from model_runner.lora.target_module import Target
from model_runner.lora.variants.biases import BIAS, LORA_BIAS, Biases
from model_runner.lora.variants.dora import MAGNITUDE
from model_runner.lora.variants.saved_modules import BASE_WEIGHT, FULL_WEIGHT, ORIGINAL, SAVED_COPY, SavedModules
from model_runner.lora.variants.trained_tokens import TOKENS, TOKENS_BASE, TrainedTokens

OPTION_OF = {MAGNITUDE: "use_dora", LORA_BIAS: "lora_bias"}
"""The options without which these parts are not read."""

PartsByModule = dict[str, dict[str, str]]
"""Tensor names by module, then by part."""


@dataclass(frozen=True, eq=False)
class TensorOwners:
    """Groups the tensors of one adapter by module. Errors are AdapterErrors that name the tensor or the option."""

    entries: Mapping[str, Entry]
    config: PeftConfig
    targets: Mapping[str, Target]
    catalogue: Catalogue
    notes: list[str]

    def group(self) -> PartsByModule:
        """Returns the tensors by module and part. Those of a tied embedding belong to the head too.

        Options that lack their tensors are added to `notes`. Raises AdapterError for tensors that the config does not
        cover.
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
            advice = MERGE
            if module in self.catalogue.norms:
                advice = with_option("modules_to_save", json.dumps(self._names_to_save()))
            raise AdapterError(
                f"tensor {quoted_name(tensor)} replaces a whole module; served are {', '.join(EMBEDDING_AND_HEAD)}"
                f" and norms in modules_to_save: {advice}"
            )
        if part not in self.config.format.parts | self.config.required_parts:
            option = OPTION_OF.get(part)
            advice = with_option(option, "true") if option else without_tensors(part.partition(".")[0])
            raise AdapterError(
                f"tensor {quoted_name(tensor)} is no part of {self.config.name}; nothing would use it: {advice}"
            )
        if module not in self.targets:
            raise AdapterError(f"tensor {quoted_name(tensor)}: {CONFIG_NAME} does not target {module}: {BY_TENSORS}")

    def _names_to_save(self) -> list[str]:
        """Returns the names that `modules_to_save` has, and those of the norms that have tensors."""
        saved = self.config.variant(SavedModules)
        owners = {parse_name(tensor, self.catalogue).module for tensor in self.entries}
        norms = sorted({leaf(module) for module in owners if module in self.catalogue.norms})
        return list(dict.fromkeys([*(saved.names if saved is not None else ()), *norms]))

    def _check_bias(self, tensor: str, module: str) -> None:
        if module in self.catalogue.norms:
            raise AdapterError(f"tensor {quoted_name(tensor)}: {module} of the model has no bias")
        biases = self.config.variant(Biases)
        if biases is None or not biases.trains_base:
            advice = with_option("bias", '"all"')
            raise AdapterError(f"tensor {quoted_name(tensor)}: {CONFIG_NAME} says bias='none': {advice}")

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
        """Notes the modules of `trainable_token_indices` that have no trained rows in the files."""
        variant = self.config.variant(TrainedTokens)
        for trained in variant.modules if variant is not None else ():
            if not any(is_named(module, trained) for module in owned if TOKENS in owned[module]):
                self.notes.append(f"trainable_token_indices means {trained}, which has no tensor for them")

    def _check_saved_modules(self, owned: PartsByModule) -> None:
        """Notes the names in `modules_to_save`, and the norms that it selects, without a tensor."""
        variant = self.config.variant(SavedModules)
        if variant is None:
            return
        full = [module for module in owned if FULL_WEIGHT in owned[module]]
        unused = [saved for saved in variant.names if not any(module.endswith(saved) for module in full)]
        if unused:
            self.notes.append(f"modules_to_save names what has no tensors ({some(unused)})")
        norms = [module for module in self.catalogue.norms if module not in owned and variant.means(module)]
        if norms and len(norms) < len(self.catalogue.norms) and not unused:
            self.notes.append(f"modules_to_save means {some(norms)} too, which have no tensors and are the base's")

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
