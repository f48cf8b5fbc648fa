"""Fills between steps: a slice at a time, in order, and a fill is reported only when all of it has arrived."""

from __future__ import annotations

import pytest
import torch
from fixtures.adapters.lora_sites import random_adapter, random_sites

from model_runner.lora.pool.fills import FillQueue
from model_runner.lora.pool.pages import RankPagePool

SITES = random_sites()
RANKS = {"q_proj": 20, "down_proj": 16}


def pool() -> RankPagePool:
    return RankPagePool(SITES, {"qkv": 4, "down": 3}, 4, torch.float32, torch.device("cpu"))


def same(ours: RankPagePool, theirs: RankPagePool) -> bool:
    return all(
        torch.equal(held.a_PSRI, theirs.pools[name].a_PSRI) and torch.equal(held.b_PRO, theirs.pools[name].b_PRO)
        for name, held in ours.pools.items()
    )


def test_advance_copies_one_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.lora.pool.fills.SLICE_BYTES", 1)
    ours, theirs = pool(), pool()
    one, two = random_adapter(SITES, 1, RANKS), random_adapter(SITES, 2, {"down_proj": 3})
    version = ours.version
    fills = FillQueue(ours)
    fills.add(one, {"qkv": [3, 1], "down": [0]})
    fills.add(two, {"down": [2]})
    reported = []
    for call in range(1, 9):  # 2 layers x (2 + 1) pages, a call that sees the end, and the first page of the next
        reported += [(call, adapter.adapter_id) for adapter, seconds in fills.advance(0.0) if seconds > 0]
        assert bool(fills)
    assert reported == [(7, 1)]
    assert ours.version == version + 1
    while fills:
        reported += [(0, adapter.adapter_id) for adapter, _ in fills.advance(0.0)]
    assert reported == [(7, 1), (0, 2)]
    theirs.fill(one, {"qkv": [3, 1], "down": [0]})
    theirs.fill(two, {"down": [2]})
    assert same(ours, theirs)


def test_advance_with_time_copies_everything() -> None:
    fills = FillQueue(pool())
    for number in range(3):
        fills.add(random_adapter(SITES, number, {"down_proj": 4}), {"down": [number]})
    assert [adapter.adapter_id for adapter, _ in fills.advance(60.0)] == [0, 1, 2]
    assert not fills
    assert fills.advance(60.0) == []


def test_clear_drops_all_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.lora.pool.fills.SLICE_BYTES", 1)
    fills = FillQueue(pool())
    fills.add(random_adapter(SITES, 1, RANKS), {"qkv": [3, 1], "down": [0]})
    fills.advance(0.0)
    fills.clear()
    assert not fills
    fills.add(random_adapter(SITES, 2, {"down_proj": 3}), {"down": [0]})
    assert [adapter.adapter_id for adapter, _ in fills.advance(60.0)] == [2]


def test_fill_at_once_is_complete_before_queued_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.lora.pool.fills.SLICE_BYTES", 1)
    ours, theirs = pool(), pool()
    large, small = random_adapter(SITES, 1, RANKS), random_adapter(SITES, 2, {"down_proj": 3})
    fills = FillQueue(ours)
    fills.add(large, {"qkv": [3, 1], "down": [0]})
    fills.advance(0.0)
    fills.fill_at_once(small, {"down": [2]})
    theirs.fill(small, {"down": [2]})
    for name, held in ours.pools.items():
        assert torch.equal(held.b_PRO[2], theirs.pools[name].b_PRO[2])
    assert [(adapter.adapter_id, seconds > 0) for adapter, seconds in fills.advance(0.0)] == [(2, True)]
    while fills:
        fills.advance(0.0)
    theirs.fill(large, {"qkv": [3, 1], "down": [0]})
    assert same(ours, theirs)


@pytest.mark.gpu
def test_fill_at_once_on_cuda_is_ordered_between_steps() -> None:
    device = torch.device("cuda")
    ours = RankPagePool(SITES, {"qkv": 4, "down": 3}, 4, torch.float32, device)
    fills, expected = FillQueue(ours), []
    held = next(pool for name, pool in ours.pools.items() if "down" in name)
    work = torch.randn(4096, 4096, device=device)
    read: list[torch.Tensor] = []
    for number in range(6):
        adapter, theirs = random_adapter(SITES, number, {"down_proj": 16}), pool()
        theirs.fill(adapter, {"down": [2]})
        expected.append(next(pool for name, pool in theirs.pools.items() if "down" in name).b_PRO[2])
        fills.fill_at_once(adapter, {"down": [2]})
        for _ in range(20):
            work = torch.tanh(work @ work)  # the step is long: a copy that does not wait for it overwrites the page
        read.append(held.b_PRO[2] + 0 * work[0, 0])
    torch.cuda.synchronize()
    for found, wanted in zip(read, expected, strict=True):
        assert torch.equal(found.cpu(), wanted)
