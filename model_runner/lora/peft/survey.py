"""Reads PEFT directories of every format: adapter_config.json and adapter_model.safetensors (or shards with an index).

Two steps, so that limits are checked and memory is measured before data is read: `read_survey` opens the files and
reads the config and the headers, `AdapterSurvey.read` reads the tensors of these open files into memory that the
caller gives. Does not depend on ids, limits and pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.directory import Directory
from engine.errors import AdapterError
from engine.messages import Footprint
from model_runner.lora.base_weights import BaseWeights
from model_runner.lora.catalogue import EMBEDDING_AND_HEAD, Catalogue
from model_runner.lora.files.adapter_config import CONFIG_NAME, read_options
from model_runner.lora.files.quoted import some
from model_runner.lora.files.tensor_file import FLOATS, Entry, TensorFile
from model_runner.lora.files.weight_files import open_weight_files
from model_runner.lora.foreign import mlx
from model_runner.lora.normal_form import Deltas, pages_for
from model_runner.lora.peft.config import PeftConfig, parse_config
from model_runner.lora.peft.convert import convert
from model_runner.lora.peft.expert_stacks import Unstacked, unstack
from model_runner.lora.peft.names import adapted_modules, parse_name
from model_runner.lora.peft.targets import resolve_targets
from model_runner.lora.peft.tensor_mapping import TensorMapper, TensorMapping
from model_runner.lora.site import full_weights_of, vectors_of
from model_runner.lora.variants.alora import ActivatedLora
from model_runner.lora.variants.saved_modules import ORIGINAL


@dataclass(frozen=True, eq=False)
class AdapterSurvey:
    """The checked config and headers of an adapter. Its values are read later, while its directory is still open.

    `notes` are for the log: what the config names and the model or the files have not.
    """

    config: PeftConfig
    files: list[TensorFile]
    mappings: list[TensorMapping]
    dialect: str
    unstacked: Unstacked
    notes: list[str]
    trainer: str = "PEFT"

    @property
    def format(self) -> str:
        """The usual name of the format with its variants, such as "PEFT activated LoRA"."""
        labels = sorted(variant.label for variant in self.config.variants if variant.label)
        return " ".join([self.trainer, *labels, self.config.name])

    @property
    def invocation(self) -> list[int]:
        """The tokens from whose last occurrence in a prompt the adapter acts; empty: from the first token."""
        activated = self.config.variant(ActivatedLora)
        return activated.invocation if activated is not None else []

    @property
    def rank(self) -> int:
        """The highest rank of any module in the normal form."""
        return max(mapping.rank for mapping in self.mappings)

    @property
    def targets(self) -> list[str]:
        """The sorted names of the modules that the adapter changes ("q_proj")."""
        return sorted({ref.slice.module for mapping in self.mappings for ref in mapping.refs})

    @property
    def vocab_size(self) -> int:
        """The size of the adapter's own vocabulary; 0: it has the base's."""
        return max(mapping.rows for mapping in self.mappings)

    @property
    def added_tokens(self) -> int:
        """The size of the adapter's own vocabulary minus that of the base's; 0 if it has the base's."""
        return next((mapping.rows - mapping.refs[0].site.vocabulary for mapping in self.mappings if mapping.rows), 0)

    @property
    def biased_module(self) -> str | None:
        """The first module that the adapter adds a bias to, or None."""
        return next((mapping.name for mapping in self.mappings if mapping.has_bias), None)

    @property
    def footprint(self) -> Footprint:
        """The rank pages, vector slots and matrix slots that the adapter needs, by group."""
        pages: dict[str, int] = {}
        for mapping in self.mappings:
            group = mapping.refs[0].site.group
            if mapping.rank:
                pages[group] = max(pages.get(group, 0), pages_for(mapping.rank))
            if mapping.has_gain or mapping.has_bias:
                pages[vectors_of(group)] = 1
            if mapping.has_full_weight:
                pages[full_weights_of(group)] = 1
        return Footprint(pages)

    @property
    def data_bytes(self) -> int:
        """The bytes of all tensors in the files."""
        return sum(file.data_bytes for file in self.files)

    @property
    def tensors(self) -> int:
        """The number of tensors in the files."""
        return sum(len(file.entries) for file in self.files)

    def cast_from(self, dtype: torch.dtype) -> list[str]:
        """Returns the float dtypes in the files that are not the serving dtype."""
        kinds = {FLOATS[entry.dtype] for file in self.files for entry in file.entries.values()}
        return sorted(str(kind).removeprefix("torch.") for kind in kinds if kind != dtype)

    def read(self, into: Deltas, base: BaseWeights) -> str:
        """Reads, hashes and converts the tensors, and writes them into `into`. Returns the revision.

        A module is converted once all of its tensors are read, so files in which they follow one another, as PEFT
        writes them, need memory for one module only. Raises AdapterError for values that are not finite in the dtype of
        `into`.
        """
        owners: dict[str, list[tuple[TensorMapping, str]]] = {}
        for mapping in self.mappings:
            for part, name in mapping.parts.items():
                owners.setdefault(name, []).append((mapping, part))
        incomplete: dict[str, dict[str, torch.Tensor]] = {}
        digest = hashlib.sha256(self.config.scale_bytes())
        for file in self.files:
            for stored, tensor in file.tensors(digest.update):
                for name, values in self.unstacked.parts(stored, tensor):
                    for mapping, part in owners[name]:
                        held = incomplete.setdefault(mapping.name, {})
                        held[part] = values[:0] if part == ORIGINAL else values.clone()  # the original is not used
                        if len(held) == len(mapping.parts):
                            convert(mapping, incomplete.pop(mapping.name), into, base)
        return digest.hexdigest()


def read_survey(directory: Directory, catalogue: Catalogue) -> AdapterSurvey:
    """Reads config and headers of the adapter and checks every name and shape against the model."""
    options = read_options(directory)
    if mlx.is_mlx(options):
        config = parse_config(mlx.options_of(options))
        return _survey(config, [mlx.open_file(directory)], catalogue, is_mlx=True)
    return _survey(parse_config(options), open_weight_files(directory), catalogue)


def _survey(
    config: PeftConfig, files: list[TensorFile], catalogue: Catalogue, *, is_mlx: bool = False
) -> AdapterSurvey:
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= file.entries
    notes = _notes_of(config)
    unstacked = _converted(entries, catalogue) if is_mlx else unstack(entries, config, catalogue, notes)
    adapted = adapted_modules(unstacked.entries, catalogue)
    targets = {module: target for module, target in unstacked.targets.items() if module in adapted}
    if len(targets) < len(unstacked.targets):
        bare = [module for module in unstacked.targets if module not in adapted]
        notes.append(
            f"target_parameters means {len(bare)} modules without tensors, which are the base's ({some(bare)})"
        )
    if config.target_modules or (config.target_modules is None and not unstacked.targets):
        targets = resolve_targets(config, catalogue, adapted, notes) | targets
    mappings = TensorMapper(unstacked.entries, config, targets, catalogue, notes).map()
    if not mappings:
        raise AdapterError(f"its files have no tensor of a module that {CONFIG_NAME} targets")
    _check_variants(config, mappings, catalogue)
    dialect, trainer = _dialect(unstacked.entries, catalogue), "mlx-lm" if is_mlx else "PEFT"
    return AdapterSurvey(config, files, mappings, dialect, unstacked, notes, trainer)


def _converted(entries: dict[str, Entry], catalogue: Catalogue) -> Unstacked:
    """Returns mlx-lm's tensors under the names of PEFT's."""
    stored = mlx.convert(entries, catalogue)
    named = {new: entry for name, how in stored.items() for new, entry in how.entries(entries[name]).items()}
    return Unstacked(named, stacks=stored)


def _notes_of(config: PeftConfig) -> list[str]:
    """Returns the notes on what the config says beside the modules."""
    if config.task_type in (None, "CAUSAL_LM"):
        return []
    return [f"task_type={config.task_type!r} is served as CAUSAL_LM"]


def _check_variants(config: PeftConfig, mappings: Iterable[TensorMapping], catalogue: Catalogue) -> None:
    """Raises AdapterError where a variant does not fit the model, or is not served with the change of a module."""
    vocabularies = [ref.site.vocabulary for ref in catalogue.refs.get(EMBEDDING_AND_HEAD[0], ())]
    for variant in config.variants:
        for vocabulary in vocabularies:
            variant.check_vocabulary(vocabulary)
        for mapping in mappings:
            variant.check_module(mapping.module, mapping.becomes)


def _dialect(entries: Iterable[str], catalogue: Catalogue) -> str:
    """Returns the pattern of the tensors' names, such as "base_model.model.*.lora_A.weight"."""
    names = [parse_name(tensor, catalogue) for tensor in entries]
    part = min(name.part for name in names)
    if any(name.named for name in names):
        marker, dot, own = part.partition(".")
        part = f"{marker}.<name>{dot}{own}"
    return f"base_model.model.*.{part}" if all(name.prefixed for name in names) else f"*.{part}"
