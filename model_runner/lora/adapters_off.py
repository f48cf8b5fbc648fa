"""Replaces `Adapters` in a runner without LoRA: loads fail with a one-line error, and there is nothing to free."""

from __future__ import annotations

from engine.errors import InternalError
from engine.messages import AdapterState, Fill, LanePages, LoadAdapter


class AdaptersOff:
    """The interface of `Adapters`, without any adapter."""

    pages = None
    descriptor = None
    poll_seconds = None

    def load(self, message: LoadAdapter) -> AdapterState:
        """Fails, and names the flag."""
        off = f"{message.path}: LoRA is off; launch with --enable-lora"
        return AdapterState(adapter_id=message.adapter_id, state="failed", error=off)

    def unload(self, adapter_id: int) -> AdapterState:
        """Reports the adapter as gone: no adapter is ever loaded."""
        return AdapterState(adapter_id=adapter_id, state="gone")

    def evict(self, adapter_id: int) -> AdapterState:
        """There is none on the host."""
        return AdapterState(adapter_id=adapter_id, state="disk")

    def fill(self, fill: Fill) -> None:
        """Raises InternalError: the scheduler knows that LoRA is off."""
        raise InternalError(f"a fill of adapter {fill.adapter_id}, and LoRA is off")

    def set_lane(self, lane: LanePages) -> None:
        """Raises InternalError, too."""
        raise InternalError(f"lane {lane.lane} is set, and LoRA is off")

    def advance(self, seconds: float) -> list[AdapterState]:
        """Nothing is loaded or filled."""
        return []

    def start(self) -> None:
        """No loader process."""

    def reset(self) -> None:
        """No lanes and fills."""

    def close(self) -> None:
        """No loader process."""
