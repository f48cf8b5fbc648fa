"""What a model is, as numbers: the translation of each family's config.json into one Arch.

A family is a translation, not a fork: the layers read an Arch and never a config.json. FAMILIES is the one place that
knows what is served.
"""

from model_runner.config.model_config import Arch, Experts
from model_runner.config.registry import FAMILIES, Family, read_arch

__all__ = ["FAMILIES", "Arch", "Experts", "Family", "read_arch"]
