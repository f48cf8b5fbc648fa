"""Sizes: which ones fit, which ones shrink, and the flag that an error names."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError
from model_runner.build.lora_plan import PoolSize, plan_rank_pages, pool_room
from model_runner.build.memory_plan import (
    GIB,
    GRAPH_BYTES,
    graph_bytes,
    graph_sizes,
    kv_budget,
    plan_kv,
    resolve_length,
)
from model_runner.lora.normal_form import lane_pages

PAGES = {"qkv": 1000, "o": 500, "down": 700}


def test_cpu_kv_is_four_gib_or_a_quarter_of_memory() -> None:
    assert kv_budget("cpu", 64 * GIB, 60 * GIB, 0.9, 0) == 4 * GIB
    assert kv_budget("cpu", 8 * GIB, 1 * GIB, 0.9, 0) == 2 * GIB
    assert kv_budget("cpu", 8 * GIB, 1 * GIB, 0.45, 0) == 1 * GIB


def test_cuda_kv_is_the_fraction_less_used_and_reserved() -> None:
    assert kv_budget("cuda", 80 * GIB, 60 * GIB, 0.9, 10 * GIB) == 42 * GIB
    assert kv_budget("cuda", 80 * GIB, 4 * GIB, 0.5, GIB) == 0


def test_kv_pages_are_no_more_than_rows_can_fill() -> None:
    plan = plan_kv(10**9, 1000, 16, length=100, asked_length=None, asked_rows=3)
    assert (plan.pages, plan.rows, plan.max_length) == (3 * 7, 3, 100)


def test_rows_come_from_memory_and_are_at_least_one() -> None:
    assert plan_kv(10**6, 1000, 16, length=4096, asked_length=None, asked_rows=None).rows == 16000 // 512
    assert plan_kv(20_000, 1000, 16, length=300, asked_length=None, asked_rows=None).rows == 1
    assert plan_kv(10**9, 1000, 16, length=4096, asked_length=None, asked_rows=None).rows == 256


def test_default_length_shrinks_and_an_asked_one_is_refused() -> None:
    assert plan_kv(10_000, 1000, 16, length=4096, asked_length=None, asked_rows=None).max_length == 160
    with pytest.raises(ConfigError, match=r"--context-length 4096.* 160 tokens"):
        plan_kv(10_000, 1000, 16, length=4096, asked_length=4096, asked_rows=None)
    with pytest.raises(ConfigError, match="--mem-fraction-static"):
        plan_kv(999, 1000, 16, length=10, asked_length=None, asked_rows=None)


def test_max_total_tokens_is_a_bound_on_the_kv_cache() -> None:
    few = plan_kv(10**9, 1000, 16, length=100, asked_length=None, asked_rows=3, asked_tokens=70)
    assert (few.pages, few.max_length) == (4, 64)
    assert plan_kv(10**9, 1000, 16, length=100, asked_length=None, asked_rows=3, asked_tokens=1600).pages == 100
    assert plan_kv(10_000, 1000, 16, length=100, asked_length=None, asked_rows=3, asked_tokens=1600).pages == 10
    with pytest.raises(ConfigError, match=r"--context-length 100.* 64 tokens.*--max-total-tokens"):
        plan_kv(10**9, 1000, 16, length=100, asked_length=100, asked_rows=3, asked_tokens=70)
    with pytest.raises(ConfigError, match=r"--max-total-tokens 15.* 16"):
        plan_kv(10**9, 1000, 16, length=100, asked_length=None, asked_rows=3, asked_tokens=15)


def test_context_length_may_only_shrink() -> None:
    assert resolve_length(512, None) == 512
    assert resolve_length(512, 100) == 100
    with pytest.raises(ConfigError, match=r"--context-length 513.*512"):
        resolve_length(512, 513)


NO_WISH = PoolSize()


def plan(
    total: int, rank: int = 20, groups: tuple[str, ...] = ("qkv", "o"), asked: PoolSize = NO_WISH
) -> dict[str, int]:
    room = pool_room("cpu", total, total, 0.9)
    return plan_rank_pages(PAGES, groups, max_rank=rank, default=4, room=room, asked=asked)


def test_default_pool_is_a_tenth_but_at_least_one_adapter() -> None:
    assert plan(10**9) == {"qkv": 8, "o": 8}
    assert plan(65_000) == {"qkv": 4, "o": 4}  # a tenth is two adapters of 3000
    assert plan(10_000) == {"qkv": 2, "o": 2}
    assert plan(10**9, 1, ("down",)) == {"down": 4}
    assert plan(10**9, 16, ()) == {}
    with pytest.raises(ConfigError, match="--max-lora-rank 20"):
        plan(3000)


def test_asked_pool_may_be_larger_than_a_tenth() -> None:
    assert plan(30_000, asked=PoolSize(adapters=9)) == {"qkv": 18, "o": 18}
    assert plan(30_000, asked=PoolSize(bytes=9 * 3000 - 1)) == {"qkv": 16, "o": 16}
    with pytest.raises(ConfigError, match="--lora-pool-size: 10 adapters of rank 20"):
        plan(30_000, asked=PoolSize(adapters=10))
    with pytest.raises(ConfigError, match="--lora-pool-size: 9333 adapters of rank 20"):
        plan(30_000, asked=PoolSize(bytes=28 * 10**6))
    with pytest.raises(ConfigError, match="--lora-pool-size: 2999 bytes are less than one"):
        plan(30_000, asked=PoolSize(bytes=2999))


def test_cuda_pools_share_the_fraction_with_used_memory() -> None:
    assert pool_room("cuda", 80 * GIB, 60 * GIB, 0.5).free == 20 * GIB
    assert pool_room("cuda", 80 * GIB, 10 * GIB, 0.5).free == 0


def test_lane_pages_are_twice_the_largest_adapters() -> None:
    assert [lane_pages(rank) for rank in (1, 16, 17, 64)] == [2, 2, 4, 8]


def test_graph_sizes_grow_coarser_and_end_with_all_rows() -> None:
    assert graph_sizes(256, None) == [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32)]
    assert graph_sizes(4096, None)[-1] == 256
    assert graph_sizes(4096, 1000)[-3:] == [960, 992, 1000]
    assert graph_sizes(20, None) == [1, 2, 4, 8, 16, 20]
    assert graph_sizes(1, 64) == [1]
    one, two = (graph_bytes([1, 256], kinds, 4096, 14336, 2) for kinds in (1, 2))
    assert two - one == 2 * GRAPH_BYTES
