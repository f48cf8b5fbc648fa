"""Rotary frequencies: reads their parameters from a config.json (old and new keys), and computes them as transformers
does.

Sources: RoFormer (2104.09864), YaRN (2309.00071), LongRoPE (2402.13753), the Llama 3.1 model card; position
interpolation (2306.15595) for `linear`. `dynamic` does not change the frequencies up to max_position_embeddings, and
longer requests are not served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from model_runner.config.config_json import ConfigJson

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("attention_factor", "short_factor", "long_factor", "finetuned"),
}


@dataclass(frozen=True)
class Rope:
    """A rope type and its parameters; parameters of other types keep their defaults.

    rotary_share    the share of a head's dimensions that is rotated
    original        the context length of the pretraining, in tokens (llama3, yarn, longrope)
    attention       factor on cos and sin (yarn, longrope)
    divisors        divisor of each frequency (longrope)
    short_divisors  the divisors for a server whose requests have at most `original` positions (longrope)
    """

    kind: str = "default"
    theta: float = 10000.0
    rotary_share: float = 1.0
    factor: float = 1.0
    original: int = 0
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    short_divisors: tuple[float, ...] = ()

    def rotary_dim(self, head_dim: int) -> int:
        """Returns the number of dimensions of a head that are rotated."""
        return int(head_dim * self.rotary_share)

    def serving(self, length: int) -> Rope:
        """Returns the rope for a server whose longest request is `length`: with longrope and a `length` of at most
        `original`, the rope with the short divisors.

        All requests use one set of factors, because the keys in the KV cache are rotated with it.
        """
        return (
            replace(self, divisors=self.short_divisors) if self.kind == "longrope" and length <= self.original else self
        )


def read_rope(
    config: ConfigJson,
    positions: int,
    *,
    theta: float = 10000.0,
    partial: bool = False,
    original: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Rope:
    """Reads the rope from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (earlier versions).

    `theta` and `original` are the family's defaults, `aliases` its names of rope types. `partial`: the family may
    rotate only a part of each head. Raises ConfigError.
    """
    key = "rope_scaling" if config.fields.get("rope_scaling") else "rope_parameters"
    given = config.inner(key)
    if any(isinstance(value, dict) for value in given.fields.values()):
        raise config.wrong(key, "rotary embeddings that differ between layer types are not served for this family")
    share = given.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if share > 1 or (share != 1 and not partial):
        raise config.wrong(key, f"partial_rotary_factor={share} is not served for this family")
    if original is None and config.fields.get("original_max_position_embeddings") is not None:
        original = config.integer("original_max_position_embeddings")
    rope = parse_rope(given, positions, theta=config.number("rope_theta", theta), original=original, aliases=aliases)
    return replace(rope, rotary_share=share)


def parse_rope(
    given: ConfigJson,
    positions: int,
    *,
    theta: float,
    original: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Rope:
    """Parses one rope from its JSON object; the arguments are defaults for missing fields. Raises ConfigError."""
    named = given.text("rope_type", given.text("type", "default"))
    kind = (aliases or {}).get(named, named)
    if kind not in KINDS:
        raise given.wrong("rope_type", f"rope type {kind} is not served. Served are: {', '.join(KINDS)}")
    foreign = sorted(key for key, value in given.fields.items() if key not in KEYS and value is not None)
    if foreign:
        raise given.wrong(foreign[0], "not a known rope parameter")
    rope = Rope(theta=given.number("rope_theta", theta))
    if kind == "default":
        return rope
    if kind in ("linear", "dynamic"):
        return replace(rope, kind=kind, factor=given.number("factor"))
    length = original or given.integer("original_max_position_embeddings", positions)
    read = {"llama3": _read_llama3, "yarn": _read_yarn, "longrope": _read_longrope}[kind]
    return read(given, replace(rope, kind=kind, original=length), positions)


def _read_llama3(given: ConfigJson, rope: Rope, positions: int) -> Rope:
    low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
    if low == high:
        raise given.wrong("low_freq_factor", "low_freq_factor and high_freq_factor must differ")
    return replace(rope, factor=given.number("factor"), low_freq=low, high_freq=high)


def _read_yarn(given: ConfigJson, rope: Rope, positions: int) -> Rope:
    factor = given.number("factor", positions / rope.original)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = mscale(1.0)
    if given.fields.get("mscale") and given.fields.get("mscale_all_dim"):
        attention = mscale(given.number("mscale")) / mscale(given.number("mscale_all_dim"))
    return replace(
        rope,
        factor=factor,
        beta_fast=given.number("beta_fast", 32.0),
        beta_slow=given.number("beta_slow", 1.0),
        attention=given.number("attention_factor", attention),
        truncate=given.flag("truncate", True),
    )


def _read_longrope(given: ConfigJson, rope: Rope, positions: int) -> Rope:
    if rope.original < 2:
        raise given.wrong("original_max_position_embeddings", "must be at least 2")
    factor = given.number("factor", positions / rope.original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original))
    short, long = given.numbers("short_factor"), given.numbers("long_factor")
    for key, divisors in (("short_factor", short), ("long_factor", long)):
        if len(divisors) != len(short) or min(divisors, default=0) <= 0:
            raise given.wrong(key, "must hold one positive number for each pair of dimensions that is rotated")
    return replace(rope, attention=given.number("attention_factor", attention), divisors=long, short_divisors=short)


def extended_length(rope: Rope, positions: int) -> int:
    """Returns the longest request in tokens: `positions`, or with yarn `factor` * `original` where that is more."""
    return max(positions, int(rope.original * rope.factor)) if rope.kind == "yarn" else positions


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Returns the angle per position of each pair of rotated dimensions: [rotary_dim / 2], float32, on the host."""
    size = rope.rotary_dim(head_dim)
    powers = rope.theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.divisors) * powers)
    frequencies = 1.0 / powers
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "yarn":
        return _yarn(rope, size)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Keeps the frequencies of short waves, divides those of long waves by the factor, and blends those in between.

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
    """Blends along a ramp over the dimensions, from unchanged frequencies to frequencies divided by the factor."""

    def dimension(rotations: float) -> float:
        return dim * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # avoids a division by zero where both ends of the ramp coincide
    powers = rope.theta ** (torch.arange(0, dim, 2).float() / dim)
    keep = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep
