"""Rotary frequencies: how a config.json says them (old and new keys) and what they are, as transformers computes them.

Knows nothing of layers. Sources: RoFormer (2104.09864), YaRN (2309.00071), the Llama 3.1 model card; position
interpolation (2306.15595) for `linear`. `dynamic` leaves the frequencies as they are up to max_position_embeddings,
which is as far as we serve it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from model_runner.config_json import ConfigJson

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """A rope type and its numbers; those of other types keep their defaults.

    original    positions of the pretraining (llama3, yarn)
    attention   factor on cos and sin (yarn)
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original: int = 0
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float = 1.0
    truncate: bool = True


def read_rope(config: ConfigJson, positions: int) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before). Raises ConfigError."""
    key = "rope_scaling" if config.fields.get("rope_scaling") else "rope_parameters"
    given = config.inner(key)
    if any(isinstance(value, dict) for value in given.fields.values()):
        raise config.wrong(key, "rotary embeddings that differ between layer types are not served")
    kind = given.text("rope_type", given.text("type", "default"))
    if kind not in KINDS:
        raise config.wrong(key, f"rope type {kind} is not served. Served are: {', '.join(KINDS)}")
    if given.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0:
        raise config.wrong(key, "partial_rotary_factor other than 1 is not served")
    theta = given.number("rope_theta", config.number("rope_theta", 10000.0))
    if kind == "default":
        return Rope(theta=theta)
    if kind in ("linear", "dynamic"):
        return Rope(kind, theta, given.number("factor"))
    original = given.integer("original_max_position_embeddings", positions)
    if "original_max_position_embeddings" in config:
        original = config.integer("original_max_position_embeddings", original)
    if kind == "llama3":
        low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
        if low == high:
            raise config.wrong(key, "low_freq_factor and high_freq_factor must differ")
        return Rope(kind, theta, given.number("factor"), original, low, high)
    return _read_yarn(given, theta, original, positions)


def _read_yarn(given: ConfigJson, theta: float, original: int, positions: int) -> Rope:
    factor = given.number("factor", positions / original)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = mscale(1.0)
    if given.fields.get("mscale") and given.fields.get("mscale_all_dim"):
        attention = mscale(given.number("mscale")) / mscale(given.number("mscale_all_dim"))
    return Rope(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=given.number("beta_fast", 32.0),
        beta_slow=given.number("beta_slow", 1.0),
        attention=given.number("attention_factor", attention),
        truncate=given.flag("truncate", True),
    )


def rope_reach(rope: Rope, positions: int) -> int:
    """How far the model goes: yarn reaches factor times its original length, even if the config was left as it was."""
    return max(positions, int(rope.original * rope.factor)) if rope.kind == "yarn" else positions


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] float32, on the host: the angle per position of each pair of dimensions."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Short waves stay, long ones are stretched by the factor, those between are blended.

    wavelength   0 ...... original/high ...... original/low ......
    frequency    as it is |      blend        | divided by factor
    """
    wavelength = 2 * math.pi / frequencies
    stretched = torch.where(wavelength > rope.original / rope.low_freq, frequencies / rope.factor, frequencies)
    smooth = (rope.original / wavelength - rope.low_freq) / (rope.high_freq - rope.low_freq)
    blend = (1 - smooth) * stretched / rope.factor + smooth * stretched
    between = (wavelength >= rope.original / rope.high_freq) & (wavelength <= rope.original / rope.low_freq)
    return torch.where(between, blend, stretched)


def _yarn(rope: Rope, dim: int) -> torch.Tensor:
    """A ramp over the dimensions from the frequencies as they are to those divided by the factor."""

    def dimension(rotations: float) -> float:
        return dim * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp needs a width
    powers = rope.theta ** (torch.arange(0, dim, 2).float() / dim)
    keep = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep
