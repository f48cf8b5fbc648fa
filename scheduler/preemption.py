"""Who gives way when KV pages run out: a pure choice. Knows nothing of how a request is taken back."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.request import Request


def choose_victim(candidates: Sequence[Request]) -> Request:
    """The lowest priority, then the latest arrival.

    The first in order is never chosen while another is there, so it always gets on, and everything ends.
    """
    return max(candidates, key=lambda request: request.order)
