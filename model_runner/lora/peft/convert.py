"""One module's tensors into the normal form: A, B, a gain and a bias, checked and cast to the serving dtype.

Knows nothing of files and memory. Legend: R rank in the normal form, I in features, O out features of the module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.errors import AdapterError
from model_runner.lora.catalogue import OUTSIDE
from model_runner.lora.formats import dora
from model_runner.lora.normal_form import Delta, Deltas
from model_runner.lora.peft.base_weights import BaseWeights
from model_runner.lora.peft.full_matrices import merge, replace_tokens
from model_runner.lora.peft.names import COPY, show
from model_runner.lora.peft.tensor_mapping import BASE_WEIGHT, BIAS, LORA_BIAS, MAGNITUDE, WHOLE, TensorMapping


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter does to a module, in float32: A [R, I], B [R, O], gain [O], bias [O]."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    whole: torch.Tensor | None = None


def convert(mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], into: Deltas, base: BaseWeights) -> None:
    """Writes the module's change into its places. `tensors` are by part.

    Raises AdapterError for values that are not finite, before or after the cast to the dtype of `into`.
    """
    if mapping.has_whole and mapping.module.target.module in OUTSIDE:
        _write_whole(mapping, tensors, into, base)
        return
    if BASE_WEIGHT in tensors:
        _check_untrained(mapping, tensors[BASE_WEIGHT], base)
    wide = {part: tensor.float() for part, tensor in tensors.items() if part != BASE_WEIGHT}
    change = _change(mapping, wide, base, split=_serving(mapping, into) is torch.bfloat16)
    start = 0
    for place in mapping.places:
        delta = into[place.site.name][place.index]
        assert delta is not None
        columns = slice(start, start + place.out_features)
        _store(mapping, change, delta, columns, tensors)
        start = columns.stop


def _write_whole(mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], into: Deltas, base: BaseWeights) -> None:
    """A matrix of the embedding or the head, which has neither rank nor gain nor bias beside it."""
    place = mapping.places[0]
    delta = into[place.site.name][place.index]
    assert delta is not None
    assert delta.full_weight is not None
    if COPY in tensors and not torch.equal(tensors[COPY], tensors[WHOLE]):
        raise AdapterError(f"tensors {show(mapping.parts[COPY])} and {show(mapping.parts[WHOLE])} are not the same")
    if mapping.format is not None:
        merge(mapping, tensors, delta.full_weight)
    elif mapping.tokens:
        replace_tokens(mapping, tensors, delta.full_weight, base)
    else:
        delta.full_weight.copy_(tensors[WHOLE])
    if not bool(torch.isfinite(delta.full_weight).all()):
        raise _not_finite(mapping, tensors, delta.full_weight.dtype)


def _serving(mapping: TensorMapping, into: Deltas) -> torch.dtype:
    place = mapping.places[0]
    delta = into[place.site.name][place.index]
    assert delta is not None
    return delta.a.dtype


def _change(mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], base: BaseWeights, *, split: bool) -> Change:
    bias = _bias(mapping, tensors, base)
    if mapping.format is None:
        return Change(bias=bias, whole=tensors.get(WHOLE))
    a, b = mapping.format.factors(mapping.module, tensors)
    if MAGNITUDE not in tensors:
        return Change(a, b, bias=bias)
    gain = tensors[MAGNITUDE] / _lengths(mapping, a, b, base, split=split)
    return Change(a, b * gain, gain, bias)


def _lengths(
    mapping: TensorMapping, a: torch.Tensor, b: torch.Tensor, base: BaseWeights, *, split: bool
) -> torch.Tensor:
    """[O]: of the rows of the changed weight, slice by slice, where the base's weight lies."""
    found, start = [], 0
    for place in mapping.places:
        weight, stop = base.weight(place), start + place.out_features
        factors = a.to(weight.device), b[:, start:stop].to(weight.device)
        found.append(dora.lengths(weight, base.squares(place), *factors, split=split).cpu())
        start = stop
    return torch.cat(found)


def _bias(mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], base: BaseWeights) -> torch.Tensor | None:
    """What is added: lora_B's own bias, scaled as B is, and what training changed of the base's."""
    added = []
    if LORA_BIAS in tensors:
        added.append(tensors[LORA_BIAS] * mapping.module.target.scaling)
    if BIAS in tensors:
        parts = [base.bias(place) for place in mapping.places]
        known = [part.float().cpu() for part in parts if part is not None]
        if len(known) < len(parts):
            raise AdapterError(f"tensor {show(mapping.parts[BIAS])}: module {mapping.name} of the model has no bias")
        added.append(tensors[BIAS] - torch.cat(known))
    return torch.stack(added).sum(0) if added else None


def _check_untrained(mapping: TensorMapping, weight: torch.Tensor, base: BaseWeights) -> None:
    """PEFT saves the base's embedding beside LoRA on it; it may be there, but must be the base's."""
    own = base.weight(mapping.places[0])
    saved = weight.t() if mapping.module.embeds else weight
    if not torch.equal(saved, own.to(saved.device, saved.dtype)):
        raise AdapterError(
            f"tensor {show(mapping.parts[BASE_WEIGHT])} is not the base's {mapping.name}: it was trained or is another"
            " model's; whole modules are not supported"
        )


def _store(
    mapping: TensorMapping, change: Change, delta: Delta, columns: slice, tensors: Mapping[str, torch.Tensor]
) -> None:
    pairs = (
        (delta.a, change.a),
        (delta.b, None if change.b is None else change.b[:, columns]),
        (delta.gain, None if change.gain is None else change.gain[columns]),
        (delta.bias, None if change.bias is None else change.bias[columns]),
        (delta.full_weight, change.whole),
    )
    for into, value in pairs:
        if into is not None and value is not None and not bool(torch.isfinite(into.copy_(value)).all()):
            raise _not_finite(mapping, tensors, into.dtype)


def _not_finite(mapping: TensorMapping, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> AdapterError:
    for part, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            return AdapterError(f"tensor {show(mapping.parts[part])} holds NaN or infinity")
    largest = max(tensors, key=lambda part: float(tensors[part].abs().max()) if tensors[part].numel() else 0.0)
    return AdapterError(f"tensor {show(mapping.parts[largest])} holds values too large for {dtype} once scaled")
