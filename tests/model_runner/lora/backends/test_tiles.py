"""Steps cut into tiles, and the records and tables of tiles: every row is in one tile, and no tile has two lanes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from fixtures.adapters.lora_sites import random_adapter, random_sites
from fixtures.adapters.lora_world import World, layout
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import LanePages
from model_runner.compute.kernels.triton.lora.segments import RECORD
from model_runner.compute.kernels.triton.lora.tiling import (
    expand_tiling,
    programs,
    rounded_tiles,
    shrink_tiling,
    tile_rows,
)
from model_runner.lora.backends import work_table
from model_runner.lora.backends.lane_tables import LaneTables
from model_runner.lora.backends.tiles import Tiles, by_lane, by_request
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.pool.upload import BUFFERS, Upload

STEPS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1, 1, 1, 2, 15, 16, 17, 50])), min_size=1, max_size=14)
CPU = torch.device("cpu")


def rows_of(tiles: Tiles, tile: int) -> list[int]:
    start, count = int(tiles.starts[tile]), int(tiles.counts[tile])
    if start >= 0:
        return list(range(start, start + count))
    return tiles.gather[-1 - start :][:count].tolist()


@given(STEPS, st.sampled_from([16, 32]))
def test_every_row_of_a_lane_is_in_one_tile_of_that_lane(chunks: list[tuple[int, int]], rows: int) -> None:
    step = layout(chunks)
    lanes_T = np.repeat(step.lanes_C, step.lengths_C)
    for cut in (by_request, by_lane):
        tiles = cut(step, rows)
        seen = Counter(row for tile in range(len(tiles)) for row in rows_of(tiles, tile))
        assert seen == Counter(np.flatnonzero(lanes_T).tolist())
        for tile in range(len(tiles)):
            assert 1 <= tiles.counts[tile] <= rows
            assert {lanes_T[row] for row in rows_of(tiles, tile)} == {tiles.lanes[tile]}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80))
def test_by_lane_decodes_make_the_fewest_tiles(lanes: list[int]) -> None:
    tiles = by_lane(layout([(lane, 1) for lane in lanes]), 16)
    per_lane = Counter(lane for lane in lanes if lane)
    assert Counter(tiles.lanes.tolist()) == {lane: -(-number // 16) for lane, number in per_lane.items()}
    assert len(tiles) <= min(len(lanes), 6 + len(lanes) // 16)


def test_adjacent_rows_are_not_gathered() -> None:
    tiles = by_lane(layout([(2, 1), (0, 3), (1, 1), (1, 20), (2, 1), (3, 1), (4, 2), (4, 3)]), 16)
    assert tiles.lanes.tolist() == [1, 1, 2, 3, 4]
    assert [rows_of(tiles, tile) for tile in (1, 2)] == [[4, 21, 22, 23, 24], [0, 25]]
    assert tiles.starts[[0, 3, 4]].tolist() == [5, 26, 27]
    assert (tiles.starts[1:3] < 0).all()
    assert tiles.counts.tolist() == [16, 5, 2, 1, 5]


def test_records_hold_the_pages_of_the_lanes() -> None:
    world = World(torch.float32)
    tables = LaneTables(world.pages, 64, Upload(CPU))
    assert tables.refresh()
    assert not tables.refresh()
    tiles = by_request(layout([(1, 3), (0, 2), (8, 1), (10, 4)]), 16)
    places = work_table.exact_layout(tiles, tables.groups)
    assert "o" in places.groups
    table = np.full(places.size, -7, np.int32)
    work_table.write(table, places, tiles, tables.groups)
    place = places.groups["qkv"]
    items = table[place.items_at :][: place.items * RECORD].reshape(-1, RECORD)
    (one,), (two,) = (world.granted[number]["qkv"] for number in (1, 2))
    assert items[:, :4].tolist() == [[0, 3, one, 0], [5, 1, one, 0], [5, 1, two, 1]]
    assert items[:, 5].view(np.float32).tolist() == [1.0, 0.5, -1.25]
    assert items[:, 4].tolist() == [0x080808, 0x080808, 0x030010]
    work = table[place.tiles_at :][: place.tiles * RECORD].reshape(-1, RECORD)
    assert work[:, :4].tolist() == [[0, 3, 0, 1], [5, 1, 1, 2]]


def test_units_are_packed_where_sites_agree() -> None:
    world = World(torch.float32)
    tables = LaneTables(world.pages, 64, Upload(CPU))
    tables.refresh()
    lanes = tables.groups["qkv"]
    assert lanes.units_LK[5, 0] == -1  # adapter 5 has only layer 0
    for site in world.sites:
        held = tables.site_units(site.name)
        assert held.tolist() == world.pages.pools[site.name].units_PS.ravel().tolist()
        assert held.data_ptr() % 16 == tables.site_units(world.sites[0].name).data_ptr() % 16


def test_refilled_page_has_its_new_units() -> None:
    sites = random_sites(layers=1)
    pages = RankPagePool(sites, {"qkv": 1}, 1, torch.float32, CPU)
    tables = LaneTables(pages, 8, Upload(CPU))
    pages.fill(random_adapter(sites, 1, {"q_proj": 5}), {"qkv": [0]})
    pages.set_lane(LanePages(1, {"qkv": [(0, 1.0)]}))
    tables.refresh()
    assert tables.groups["qkv"].units_LK[1].tolist() == [5]
    pages.fill(random_adapter(sites, 2, {"v_proj": 16}), {"qkv": [0]})
    assert tables.refresh()
    assert tables.groups["qkv"].units_LK[1].tolist() == [16 << 16]


def test_upload_buffers_are_reused_in_turn() -> None:
    upload = Upload(CPU)
    sent = []
    for number in range(2 * BUFFERS):
        upload.buffer(number + 1)[:] = number
        sent.append(upload.send(number + 1))
    assert [values.tolist() for values in sent] == [[number] * (number + 1) for number in range(2 * BUFFERS)]


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tilings_keep_their_bounds(rows: int, itemsize: int) -> None:
    for processors in (0, 20, 132):
        for features in (8, 24, 100, 896, 4096, 14336):
            for slices in (1, 2, 3):
                for tiles in (1, 3, 40, 5000):
                    a = shrink_tiling(rows, features, slices, tiles, 8, itemsize, processors)
                    assert a.splits * a.span * a.block >= features
                    assert a.units >= 16 * slices
                    b = expand_tiling(rows, features, features * slices, tiles, 8, itemsize, processors)
                    assert all(n & (n - 1) == 0 for n in (a.block, a.units, a.splits, b.block, b.pages))
    assert [tile_rows(longest, 64) for longest in (1, 16, 17, 500)] == [16, 16, 64, 64]
    assert [rounded_tiles(tiles, 16) for tiles in (1, 3, 4, 15, 16, 300, 9999)] == [1, 1, 4, 4, 16, 256, 256]
    assert [programs(100, others, 132) for others in (1, 16, 1000)] == [100, 49, 1]
