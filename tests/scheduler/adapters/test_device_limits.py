"""scheduler.adapters.device_limits: adapters that can never fit are refused; the error names the limit and its flag."""

from __future__ import annotations

from engine.messages import AdapterState, Capacity, Footprint
from scheduler.adapters.copies import AdapterCopy, DeviceCopy, DeviceState
from scheduler.adapters.device_limits import limit_error, never_fits, pages_needed


def _capacity(pool: int) -> Capacity:
    return Capacity(
        kv_pages=1,
        page_size=1,
        rows=1,
        max_length=1,
        max_batched_tokens=1,
        vocab_size=1,
        rank_pages={"qkv": pool},
        max_lane_pages=4,
    )


def _copy(copy_id: int, pages: int, state: DeviceState = DeviceState.NONE) -> AdapterCopy:
    info = AdapterState(adapter_id=copy_id, state="host", footprint=Footprint({"qkv": pages, "o": 0}))
    return AdapterCopy(copy_id, copy_id, info, device=DeviceCopy(state))


def test_pages_are_summed_by_group() -> None:
    assert pages_needed([_copy(1, 2), _copy(2, 3)]) == {"qkv": 5}
    assert pages_needed([]) == {}


def test_limit_errors_name_the_limit() -> None:
    capacity = _capacity(6)
    assert "needs 7 LoRA rank pages of group qkv" in (limit_error([_copy(1, 7)], capacity) or "")
    two, three = _copy(2, 3), _copy(3, 3)
    assert limit_error([two], capacity) is None
    assert "6 rank pages long" in (limit_error([two, three], capacity) or "")
    three.error = "no such file"
    assert limit_error([three], capacity) == "no such file"


def test_copies_that_never_fit_beside_pinned_ones() -> None:
    capacity, pinned = _capacity(4), _copy(1, 3, DeviceState.RESIDENT)
    assert "pinned" in (never_fits([_copy(2, 2)], [pinned], capacity) or "")
    assert never_fits([_copy(3, 1)], [pinned], capacity) is None
    assert never_fits([pinned], [pinned], capacity) is None, "it is counted once"
    assert never_fits([_copy(2, 2)], [_copy(4, 3)], capacity) is None, "a pinned copy on disk takes no pages"
