"""Writes one module's tensors into the normal form, checked and cast to the serving dtype.

The format and its variants decide what the tensors become. Does not depend on files and memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.errors import AdapterError
from model_runner.lora.base_weights import BaseWeights, ModuleSlice
from model_runner.lora.catalogue import EMBEDDING_AND_HEAD, SiteRef
from model_runner.lora.files.quoted import quoted_name
from model_runner.lora.normal_form import Delta, Deltas
from model_runner.lora.peft.full_weights import merge, replace_tokens
from model_runner.lora.peft.tensor_mapping import TensorMapping
from model_runner.lora.target_module import BaseSlices, Change
from model_runner.lora.variants.biases import BIAS
from model_runner.lora.variants.saved_modules import BASE_WEIGHT, FULL_WEIGHT, SAVED_COPY


def convert(mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], into: Deltas, base: BaseWeights) -> None:
    """Writes the module's change into its slices. `tensors` are keyed by part.

    Raises AdapterError for values that are not finite, before or after the cast to the dtype of `into`.
    """
    if mapping.has_full_weight and mapping.name in EMBEDDING_AND_HEAD:
        _write_full_weight(mapping, tensors, into, base)
        return
    if BASE_WEIGHT in tensors:
        _check_untrained(mapping, tensors[BASE_WEIGHT], base)
    wide = {part: tensor.float() for part, tensor in tensors.items() if part != BASE_WEIGHT}
    change = _change(mapping, wide, base, _delta(mapping.refs[0], into).a.dtype)
    start = 0
    for ref in mapping.refs:
        columns = slice(start, start + ref.out_features)
        _store(mapping, change, _delta(ref, into), columns, tensors)
        start = columns.stop


def _delta(ref: SiteRef, deltas: Deltas) -> Delta:
    delta = deltas[ref.site.name][ref.index]
    assert delta is not None
    return delta


def _write_full_weight(
    mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], into: Deltas, base: BaseWeights
) -> None:
    """Writes a full matrix of the embedding or the head, which has no rank, gain or bias in addition."""
    full_weight = _delta(mapping.refs[0], into).full_weight
    assert full_weight is not None
    if SAVED_COPY in tensors and not torch.equal(tensors[SAVED_COPY], tensors[FULL_WEIGHT]):
        copy, original = mapping.parts[SAVED_COPY], mapping.parts[FULL_WEIGHT]
        raise AdapterError(f"tensors {quoted_name(copy)} and {quoted_name(original)} are not the same")
    if mapping.format is not None:
        merge(mapping, tensors, full_weight)
    elif mapping.tokens:
        replace_tokens(mapping, tensors, full_weight, base)
    else:
        full_weight.copy_(tensors[FULL_WEIGHT])
    if not bool(torch.isfinite(full_weight).all()):
        raise _not_finite(mapping, tensors, full_weight.dtype)


def _change(
    mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], base: BaseWeights, dtype: torch.dtype
) -> Change:
    """Returns the change that the format computes from the tensors, after each variant is applied to it."""
    change = Change(full_weight=tensors.get(FULL_WEIGHT))
    if mapping.format is not None:
        change = mapping.format.change(mapping.module, tensors)
    for variant in mapping.variants:
        change = variant.apply(change, mapping.module, tensors, _base_slices(mapping, base), dtype)
    return change


def _base_slices(mapping: TensorMapping, base: BaseWeights) -> BaseSlices:
    bias_tensor = quoted_name(mapping.parts.get(BIAS, ""))
    return [ModuleSlice(base, ref, mapping.name, bias_tensor) for ref in mapping.refs]


def _check_untrained(mapping: TensorMapping, weight: torch.Tensor, base: BaseWeights) -> None:
    """Raises AdapterError for a weight beside LoRA on an embedding, where PEFT saves it, that is not the base's."""
    own = base.weight(mapping.refs[0])
    saved = weight.t() if mapping.module.embeds else weight
    if not torch.equal(saved, own.to(saved.device, saved.dtype)):
        raise AdapterError(
            f"tensor {quoted_name(mapping.parts[BASE_WEIGHT])} is not the base's {mapping.name}: it was trained or is"
            " another model's; whole modules are not supported"
        )


def _store(
    mapping: TensorMapping, change: Change, delta: Delta, columns: slice, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Copies the columns of one slice into its delta. Raises AdapterError for values that are not finite."""
    pairs = (
        (delta.a, change.a),
        (delta.b, None if change.b is None else change.b[:, columns]),
        (delta.gain, None if change.gain is None else change.gain[columns]),
        (delta.bias, None if change.bias is None else change.bias[columns]),
        (delta.full_weight, change.full_weight),
    )
    for into, value in pairs:
        if into is not None and value is not None and not bool(torch.isfinite(into.copy_(value)).all()):
            raise _not_finite(mapping, tensors, into.dtype)


def _not_finite(mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> AdapterError:
    """Returns an error naming the tensor that holds NaN or infinity, or else the one with the largest value."""
    for part, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            return AdapterError(f"tensor {quoted_name(mapping.parts[part])} holds NaN or infinity")
    largest = max(tensors, key=lambda part: float(tensors[part].abs().max()) if tensors[part].numel() else 0.0)
    return AdapterError(f"tensor {quoted_name(mapping.parts[largest])} holds values too large for {dtype} once scaled")
