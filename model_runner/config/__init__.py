"""The configuration of a model: each family's config.json is translated into one type, ModelConfig.

Each family has one translating function; the layers read a ModelConfig and never a config.json. FAMILIES is the table
of all families that are served.
"""

from model_runner.config.model_config import Experts, ModelConfig
from model_runner.config.registry import FAMILIES, Family, read_model_config

__all__ = ["FAMILIES", "Experts", "Family", "ModelConfig", "read_model_config"]
