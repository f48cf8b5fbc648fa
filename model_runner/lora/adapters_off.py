"""Replaces `Adapters` in a runner without LoRA: loads fail with a one-line error, and there is nothing to free."""

from __future__ import annotations

from engine.errors import InternalError
from engine.messages import AdapterState, Fill, LanePages, LoadAdapter


class AdaptersOff:
    """The interface of `Adapters` in a runner without LoRA."""

    pages = None
    descriptor = None
    poll_seconds = None

    def load(self, message: LoadAdapter) -> AdapterState:
        """Returns the state "failed" with an error that names the flag --enable-lora."""
        off = f"{message.path}: LoRA is off; launch with --enable-lora"
        return AdapterState(adapter_id=message.adapter_id, state="failed", error=off)

    def unload(self, adapter_id: int) -> AdapterState:
        """Reports the adapter as gone: no adapter is ever loaded."""
        return AdapterState(adapter_id=adapter_id, state="gone")

    def evict(self, adapter_id: int) -> AdapterState:
        """Reports the adapter as on disk only: no adapter is ever in host memory."""
        return AdapterState(adapter_id=adapter_id, state="disk")

    def fill(self, fill: Fill) -> None:
        """Raises InternalError: the scheduler never fills an adapter while LoRA is off."""
        raise InternalError(f"a fill of adapter {fill.adapter_id}, and LoRA is off")

    def set_lane(self, lane: LanePages) -> None:
        """Raises InternalError: the scheduler never sets a lane while LoRA is off."""
        raise InternalError(f"lane {lane.lane} is set, and LoRA is off")

    def advance(self, seconds: float) -> list[AdapterState]:
        """Returns no states, because nothing is loaded or filled."""
        return []

    def start(self) -> None:
        """Does nothing: there is no loader process."""

    def reset(self) -> None:
        """Does nothing: there are no lanes and fills."""

    def close(self) -> None:
        """Does nothing: there is no loader process."""
