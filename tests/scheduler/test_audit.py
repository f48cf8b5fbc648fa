"""scheduler.audit: the audit finds tables that disagree."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.scheduling.by_hand import add_adapter, generate, new_core, plan_of


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (lambda state, r: r.pages.pop(), "references"),
        (lambda state, r: state.requests.clear(), "1: 1} requests"),
        (lambda state, r: state.waiting.push(r), "runs and waits"),
        (lambda state, r: setattr(r, "steps_in_flight", 2), "steps in flight"),
        (lambda state, r: setattr(r, "pending", 0), "pending"),
        (lambda state, r: setattr(r, "computed", 30), "room"),
        (lambda state, r: setattr(r, "lane", 2), "lane"),
        (lambda state, r: setattr(state.registry.copies[1].device, "lanes", 0), "lanes"),
        (lambda state, r: state.running._free.pop(), "rows"),
        (lambda state, r: setattr(state.host_cache, "bytes", 7), "host bytes"),
        (lambda state, r: state.host_cache.held.clear(), "host tier"),
        (lambda state, r: state.host_cache.spare.put(1, 1), "spare"),
    ],
)
def test_check_finds_tables_that_disagree(fault: Any, text: str) -> None:
    core = new_core()
    add_adapter(core, 1)
    core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    plan_of(core)
    state = core._state
    fault(state, state.requests[1])
    with pytest.raises(AssertionError, match=text):
        core.check()
