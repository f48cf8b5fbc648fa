"""scheduler.reasons: each thing that a request may lack, by hand."""

from __future__ import annotations

from by_hand import add_adapter, done, generate, new_core, plan_of

from engine.messages import AdapterState, Footprint, LoadAdapter
from scheduler.core import Scheduler


def _reasons(core: Scheduler) -> dict[str, int]:
    return dict(core.stats().waiting_reasons)


def test_rows_then_pages() -> None:
    core = new_core(rows=1)
    core.handle(generate(1), 0.0)
    plan_of(core)
    core.handle(generate(2), 0.0)
    core.handle(generate(3), 0.0)
    assert (core.why(1), core.why(2), core.why(9)) == (None, "rows", None)
    assert _reasons(core) == {"rows": 2}
    core = new_core(kv_pages=2)
    core.handle(generate(1, prompt=7), 0.0)
    plan_of(core)
    core.handle(generate(2), 0.0)
    assert (core.why(2), _reasons(core)) == ("pages", {"pages": 1})


def test_load_then_fill_then_a_lane() -> None:
    core = new_core(rank_pages={"qkv": 3})
    for number in (1, 2):
        add_adapter(core, number)
        core.handle(generate(number, lora=[(number, 1.0)]), 0.0)
    done(core, plan_of(core))
    core.handle(LoadAdapter(adapter_id=3, path="p"), 0.0)
    core.handle(generate(3, lora=[(3, 1.0)]), 0.0)
    assert core.why(3) == "load"
    card = AdapterState(adapter_id=3, state="host", footprint=Footprint({"qkv": 1}), bytes=10**9)
    core.handle(card, 0.0)
    done(core, plan_of(core))
    assert core.why(3) == "fill"
    core.handle(AdapterState(adapter_id=3, state="resident"), 0.0)
    assert (core.why(3), _reasons(core)) == ("lanes", {"lanes": 1})


def test_rank_pages() -> None:
    core = new_core(rank_pages={"qkv": 2})
    add_adapter(core, 1, pages=1)
    core.handle(generate(1, lora=[(1, 1.0)]), 0.0)
    done(core, plan_of(core))
    core.handle(LoadAdapter(adapter_id=2, path="p"), 0.0)
    core.handle(AdapterState(adapter_id=2, state="host", footprint=Footprint({"qkv": 2})), 0.0)
    core.handle(generate(2, lora=[(2, 1.0)]), 0.0)
    done(core, plan_of(core))
    assert (core.why(2), _reasons(core)) == ("rank_pages", {"rank_pages": 1})
