"""The engine library, used by programs that embed the engine and by the three processes.

Importing it does not import torch. The names below are the public API.
"""

from engine.client.completion import Completion
from engine.client.engine import Engine
from engine.client.lora_request import LoRARequest
from engine.errors import (
    AdapterError,
    ConfigError,
    EngineDead,
    EngineError,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unauthorized,
)
from engine.messages import AdapterCard, ChatMessage, Delta, SamplingParams, Usage

__all__ = [
    "AdapterCard",
    "AdapterError",
    "ChatMessage",
    "Completion",
    "ConfigError",
    "Delta",
    "Engine",
    "EngineDead",
    "EngineError",
    "Forbidden",
    "InternalError",
    "InvalidRequest",
    "LoRARequest",
    "NotFound",
    "Overloaded",
    "SamplingParams",
    "Unauthorized",
    "Usage",
]
