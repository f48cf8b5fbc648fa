"""Fills between steps: a slice at a time, in order, and nothing is told before all of it is there."""

from __future__ import annotations

import pytest
import torch
from lora_sites import random_adapter, random_sites

from model_runner.lora.fills import Fills
from model_runner.lora.pages import RankPages

SITES = random_sites()
RANKS = {"q_proj": 20, "down_proj": 16}


def pool() -> RankPages:
    return RankPages(SITES, {"qkv": 4, "down": 3}, 4, torch.float32, torch.device("cpu"))


def same(ours: RankPages, theirs: RankPages) -> bool:
    return all(
        torch.equal(held.a_PSRI, theirs.pools[name].a_PSRI) and torch.equal(held.b_PRO, theirs.pools[name].b_PRO)
        for name, held in ours.pools.items()
    )


def test_a_turn_copies_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.lora.fills.SLICE_BYTES", 1)
    ours, theirs = pool(), pool()
    one, two = random_adapter(SITES, 1, RANKS), random_adapter(SITES, 2, {"down_proj": 3})
    version = ours.version
    fills = Fills(ours)
    fills.add(one, {"qkv": [3, 1], "down": [0]})
    fills.add(two, {"down": [2]})
    told = []
    for turn in range(1, 9):  # 2 layers x (2 + 1) pages, a turn to see the end, and the first page of the next
        told += [(turn, adapter.adapter_id) for adapter, seconds in fills.advance(0.0) if seconds > 0]
        assert bool(fills)
    assert told == [(7, 1)]
    assert ours.version == version + 1
    while fills:
        told += [(0, adapter.adapter_id) for adapter, _ in fills.advance(0.0)]
    assert told == [(7, 1), (0, 2)]
    theirs.fill(one, {"qkv": [3, 1], "down": [0]})
    theirs.fill(two, {"down": [2]})
    assert same(ours, theirs)


def test_with_time_enough_a_turn_does_all() -> None:
    fills = Fills(pool())
    for number in range(3):
        fills.add(random_adapter(SITES, number, {"down_proj": 4}), {"down": [number]})
    assert [adapter.adapter_id for adapter, _ in fills.advance(60.0)] == [0, 1, 2]
    assert not fills
    assert fills.advance(60.0) == []


def test_a_new_scheduler_knows_no_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.lora.fills.SLICE_BYTES", 1)
    fills = Fills(pool())
    fills.add(random_adapter(SITES, 1, RANKS), {"qkv": [3, 1], "down": [0]})
    fills.advance(0.0)
    fills.clear()
    assert not fills
    fills.add(random_adapter(SITES, 2, {"down_proj": 3}), {"down": [0]})
    assert [adapter.adapter_id for adapter, _ in fills.advance(60.0)] == [2]
