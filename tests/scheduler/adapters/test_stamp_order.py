"""scheduler.adapters.stamp_order: items come in the order of their stamps, whatever changes were made in between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.adapters.stamp_order import StampOrder


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 9))))
def test_any_history_equals_a_sorted_dict(history: list[tuple[bool, int, int]]) -> None:
    order, model = StampOrder(), dict[int, int]()
    for enters, copy_id, stamp in history:
        if enters:
            order.put(copy_id, stamp)
            model[copy_id] = stamp
        else:
            order.drop(copy_id)
            model.pop(copy_id, None)
        assert list(order) == sorted(model, key=lambda each: (model[each], each))
        assert (len(order), 3 in order) == (len(model), 3 in model)
    order.clear()
    assert list(order) == []
