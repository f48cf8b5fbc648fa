"""The engine library, used by programs that embed the engine and by the three processes.

The names below are the public API. Each is imported when it is first used: importing the package imports nothing, so
that `python -m engine.launch` can choose first where packages are looked for. No name imports torch.
"""

TYPE_CHECKING = False  # type checkers take it as True

if TYPE_CHECKING:
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
        StorageFailed,
        Unauthorized,
    )
    from engine.messages import AdapterCard, ChatMessage, Delta, SamplingParams, Usage
else:

    def __getattr__(name: str) -> object:
        from importlib import import_module

        for module, names in _NAMES.items():
            if name in names:
                return getattr(import_module(module), name)
        raise AttributeError(f"module 'engine' has no attribute '{name}'")

    def __dir__() -> list[str]:
        return sorted([*globals(), *__all__])


_NAMES = {
    "engine.client.completion": ["Completion"],
    "engine.client.engine": ["Engine"],
    "engine.client.lora_request": ["LoRARequest"],
    "engine.errors": [
        "AdapterError",
        "ConfigError",
        "EngineDead",
        "EngineError",
        "Forbidden",
        "InternalError",
        "InvalidRequest",
        "NotFound",
        "Overloaded",
        "StorageFailed",
        "Unauthorized",
    ],
    "engine.messages": ["AdapterCard", "ChatMessage", "Delta", "SamplingParams", "Usage"],
}

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
    "StorageFailed",
    "Unauthorized",
    "Usage",
]
