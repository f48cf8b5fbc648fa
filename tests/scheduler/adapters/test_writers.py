"""Each field of an adapter copy is written by one class: HostCache, DeviceCache or AdapterRegistry.

See scheduler.adapters.copies.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fixtures.scheduling.simulation.seeded_world import World
from fixtures.scheduling.simulation.simulation import Simulation

from scheduler.adapters.copies import Adapter, AdapterCopy, DeviceCopy, HostCopy, References

SCHEDULER = Path(__file__).parents[3] / "scheduler"
HOST_CACHE = "scheduler.adapters.host_cache"
DEVICE_CACHE = "scheduler.adapters.device_cache"
REGISTRY = "scheduler.adapters.registry"
WRITERS = {
    HostCopy: HOST_CACHE,
    DeviceCopy: DEVICE_CACHE,
    References: REGISTRY,
    AdapterCopy: REGISTRY,
    Adapter: REGISTRY,
}
WHOLE_PARTS = {"host": HOST_CACHE, "device": DEVICE_CACHE}  # fields whose whole object is replaced for a new runner
NEVER_WRITTEN = {("Adapter", "id"), ("AdapterCopy", "id"), ("AdapterCopy", "references")}
CHANGED_IN_PLACE = {"names": REGISTRY, "tried_paths": HOST_CACHE}
CHANGES = {"append", "clear", "pop", "update", "extend", "remove", "insert", "setdefault", "popitem"}


def _writer_of(cls: type, name: str) -> str:
    return WHOLE_PARTS.get(name, WRITERS[cls]) if cls is AdapterCopy else WRITERS[cls]


def _watch(monkeypatch: pytest.MonkeyPatch, cls: type, written: set[tuple[str, str]]) -> None:
    def checked(self: object, name: str, value: Any) -> None:
        frame = sys._getframe(1)
        if frame.f_code.co_name != "__init__":
            writer = frame.f_globals["__name__"]
            assert writer == _writer_of(cls, name), f"{writer} writes {cls.__name__}.{name}"
            written.add((cls.__name__, name))
        object.__setattr__(self, name, value)

    monkeypatch.setattr(cls, "__setattr__", checked)


def test_fields_of_a_copy_have_one_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    written: set[tuple[str, str]] = set()
    for cls in WRITERS:
        _watch(monkeypatch, cls, written)
    faults = {"abort_rate": 0.1, "reset_rate": 0.02, "churn_rate": 0.15, "faulty_rate": 0.1, "file_rate": 0.1}
    rates = faults | {"twin_rate": 0.3, "mix_rate": 0.3, "preload_rate": 0.2}
    for seed in range(3):
        Simulation(World(500 + seed, 2, requests=70, adapters=12, max_loras=3, max_loaded=4, **rates)).run()
    everything = {(cls.__name__, each.name) for cls in WRITERS for each in fields(cls)}
    in_place = {(cls, name) for cls, name in everything if name in CHANGED_IN_PLACE}
    assert written == everything - NEVER_WRITTEN - in_place


def _changed_in_place(tree: ast.Module) -> Iterator[str]:
    """Yields the names of attributes whose items are assigned or deleted, or on which a method of CHANGES is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            changed = node.func.value
        else:
            continue
        if isinstance(changed, ast.Attribute):
            yield changed.attr


@pytest.mark.parametrize(("name", "writer"), CHANGED_IN_PLACE.items())
def test_containers_of_a_copy_have_one_writer(name: str, writer: str) -> None:
    modules = {
        "scheduler." + ".".join(path.relative_to(SCHEDULER).with_suffix("").parts)
        for path in SCHEDULER.rglob("*.py")
        if name in _changed_in_place(ast.parse(path.read_text()))
    }
    assert modules == {writer}
