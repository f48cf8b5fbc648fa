"""LoRARequest: an adapter's name, number and path, with the fields of vLLM's class of the same name."""

from __future__ import annotations

import msgspec

from engine.errors import InvalidRequest


class LoRARequest(msgspec.Struct, frozen=True):
    """An adapter's name, a number chosen by the caller (>= 1) and its path. Raises InvalidRequest for invalid fields.

    The name selects the adapter; the engine does not use the number.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        if not self.lora_name:
            raise InvalidRequest("LoRARequest: lora_name must not be empty", param="lora_name")
        if self.lora_int_id < 1:
            raise InvalidRequest(f"LoRARequest: lora_int_id {self.lora_int_id} must be at least 1", param="lora_int_id")
        if not self.lora_path:
            raise InvalidRequest("LoRARequest: lora_path must not be empty", param="lora_path")

    @property
    def adapter_id(self) -> int:
        """The number chosen by the caller."""
        return self.lora_int_id

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.lora_name

    @property
    def path(self) -> str:
        """The path or hub id of the adapter's files."""
        return self.lora_path
