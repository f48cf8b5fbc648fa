"""LoRA on parameters (PEFT's `target_parameters`): splits the one A and B for all experts of a layer by expert.

    mlp.experts.base_layer.lora_A.weight  [E r, in]     rows e r to (e + 1) r are expert e's A
    mlp.experts.base_layer.lora_B.weight  [out, r E]    columns e, e + E, e + 2 E, ... are expert e's B

transformers 5 fuses experts into the parameters gate_up_proj and down_proj. PEFT wraps one around the other, so the
two are distinguished by shape, not by name. Does not depend on values. Legend: E experts, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from engine.errors import AdapterError
from model_runner.lora.catalogue import Catalogue, is_named
from model_runner.lora.files.quoted import quoted_name, some
from model_runner.lora.files.tensor_file import Entry
from model_runner.lora.peft.config import PeftConfig
from model_runner.lora.peft.targets import Scales
from model_runner.lora.site import EXPERTS
from model_runner.lora.target_module import Target
from model_runner.lora.variants.target_parameters import TargetParameters

STACKED = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>\d+)\.[^.]+\.experts(?P<inner>(?:\.base_layer)*)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight"
)
PARAMETERS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Stack:
    """One stored tensor: A or B of one module in each expert."""

    half: str
    modules: tuple[str, ...]
    rank: int

    def names(self) -> list[str]:
        """Returns the names that the parts would have if each expert were saved separately."""
        return [f"{module}.lora_{self.half}.weight" for module in self.modules]

    def parts(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each expert's part with its name."""
        experts = len(self.modules)
        by_expert = tensor.view(experts, self.rank, -1)
        if self.half == "B":
            by_expert = tensor.view(-1, self.rank, experts).permute(2, 0, 1)
        yield from zip(self.names(), by_expert, strict=True)

    def entries(self, entry: Entry) -> dict[str, Entry]:
        """Returns the header entries that the parts would have if each expert were saved separately."""
        long, short = entry.shape if self.half == "B" else reversed(entry.shape)
        shape = [long, self.rank] if self.half == "B" else [self.rank, long]
        assert short == self.rank * len(self.modules)
        return {name: Entry(entry.dtype, shape, entry.data_offsets) for name in self.names()}


class Stored(Protocol):
    """A stored tensor that has other names, or becomes several tensors."""

    def parts(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors that it becomes, by name."""


@dataclass(frozen=True)
class Unstacked:
    """An adapter's tensors with the stacks split, and what `target_parameters` targets."""

    entries: Mapping[str, Entry]
    targets: dict[str, Target] = field(default_factory=dict)
    stacks: Mapping[str, Stored] = field(default_factory=dict)

    def parts(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the parts of a stored tensor, by name: one per expert for a stack, else the tensor itself."""
        if name in self.stacks:
            yield from self.stacks[name].parts(tensor)
        else:
            yield name, tensor


def unstack(entries: Mapping[str, Entry], config: PeftConfig, catalogue: Catalogue, notes: list[str]) -> Unstacked:
    """Splits the stacked tensors by expert. Targeted parameters that the model does not have are added to `notes`.

    Raises AdapterError for a stack that fits no parameter.
    """
    variant = config.variant(TargetParameters)
    if variant is None:
        return Unstacked(entries)
    targets, stacked = _targets(variant.names, Scales(config, catalogue), catalogue, notes)
    plain, stacks = dict(entries), {}
    for (layer, _), halves in _pairs(entries).items():
        for tensor, stack in _stack(layer, halves, entries, stacked):
            stacks[tensor] = stack
            plain |= stack.entries(plain.pop(tensor))
    return Unstacked(plain, targets, stacks)


@dataclass(frozen=True)
class _Parameter:
    """A fused parameter of one layer: the module of each expert in it, and the sizes of one module."""

    modules: tuple[str, ...]
    in_features: int
    out_features: int
    target: Target


def _targets(
    names: Sequence[str], scales: Scales, catalogue: Catalogue, notes: list[str]
) -> tuple[dict[str, Target], dict[int, list[_Parameter]]]:
    """Returns the modules that `names` target, by name, and the targeted fused parameters, by layer."""
    used: set[str] = set()
    targets: dict[str, Target] = {}
    stacked: dict[int, list[_Parameter]] = {}

    def target(parameter: str) -> Target | None:
        found = [name for name in names if is_named(parameter, name)]
        used.update(found)
        return scales.target(parameter) if found else None

    for module, (ref, *_) in catalogue.refs.items():
        is_expert = ref.site.group == EXPERTS
        one = None if is_expert else target(f"{catalogue.renamed_by_transformers(module)}.weight")
        if one is not None:
            targets[module] = replace(one, module=module)
    for layer in catalogue.experts:
        for parameter in _fused_parameters(layer, target, catalogue):
            targets |= {module: replace(parameter.target, module=module) for module in parameter.modules}
            stacked.setdefault(layer, []).append(parameter)
    unknown = [name for name in names if name not in used]
    if unknown:
        notes.append(f"target_parameters names what the model has not ({some(unknown)})")
    return targets, stacked


def _fused_parameters(layer: int, target: Callable[[str], Target | None], catalogue: Catalogue) -> Iterator[_Parameter]:
    """Yields the layer's fused parameters that are targeted. The sites of an expert are gate_up, then down."""
    sites = catalogue.experts[layer]
    for index, name in enumerate(PARAMETERS):
        found = target(f"model.layers.{layer}.mlp.experts.{name}")
        if found is not None:
            modules = tuple(catalogue.module_of(site) for site in sites[index :: len(PARAMETERS)])
            yield _Parameter(modules, sites[index].in_features, sites[index].out_features, found)


def _pairs(entries: Mapping[str, Entry]) -> dict[tuple[int, str], dict[str, str]]:
    """Returns the names of the stacked tensors A and B, by layer and wrapper."""
    pairs: dict[tuple[int, str], dict[str, str]] = {}
    for tensor in entries:
        found = STACKED.fullmatch(tensor)
        if found is not None:
            halves = pairs.setdefault((int(found["layer"]), found["inner"]), {})
            if found["half"] in halves:
                raise AdapterError(
                    f"tensors {quoted_name(halves[found['half']])} and {quoted_name(tensor)} are the same part"
                )
            halves[found["half"]] = tensor
    return pairs


def _stack(
    layer: int, halves: Mapping[str, str], entries: Mapping[str, Entry], stacked: Mapping[int, list[_Parameter]]
) -> Iterator[tuple[str, Stack]]:
    """Yields A and B as stacks of the parameter that their shapes fit. Raises AdapterError if none fits."""
    shapes = {half: entries[tensor].shape for half, tensor in halves.items()}
    for parameter in stacked.get(layer, []):
        units = parameter.target.rank * len(parameter.modules)
        if shapes == {"A": [units, parameter.in_features], "B": [parameter.out_features, units]}:
            for half, tensor in halves.items():
                yield tensor, Stack(half, parameter.modules, parameter.target.rank)
            return
    tensor = next(iter(halves.values()))
    raise AdapterError(
        f"tensor {quoted_name(tensor)} and its other half, of shapes {shapes}, fit no parameter targeted there"
    )
