"""What a model is, as numbers: the translation of each family's config.json into one ModelConfig.

A family is one translation: the layers read a ModelConfig and never a config.json. FAMILIES is the table of all
families that are served.
"""

from model_runner.config.model_config import Experts, ModelConfig
from model_runner.config.registry import FAMILIES, Family, read_model_config

__all__ = ["FAMILIES", "Experts", "Family", "ModelConfig", "read_model_config"]
