"""LoRA by triton kernels: one shrink and one expand per site, over the step's tiles.

    layout --cut--> tiles --records--> table on the host --one copy--> table on the device      once per step
    x --shrink--> h [split, row, page, slice, 16] --expand--> y, in place                       once per site

A plan is kept while lanes and layout stay the same, so that consecutive decode steps plan nothing. A subclass cuts
the step into tiles. Legend: T tokens of the step, I in features, O out features.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from engine.errors import ConfigError
from model_runner.compute.kernels.triton.interpreter import interpreting
from model_runner.compute.kernels.triton.lora.expand import Vectors, expand
from model_runner.compute.kernels.triton.lora.shrink import shrink
from model_runner.compute.kernels.triton.lora.tiling import (
    INTERPRETED,
    ExpandTiling,
    ShrinkTiling,
    expand_tiling,
    programs,
    shrink_tiling,
)
from model_runner.lora.backends import work_table
from model_runner.lora.backends.base import DEFAULTS, LoraBackend, Options
from model_runner.lora.backends.lane_tables import LaneTables
from model_runner.lora.backends.tiles import Tiles
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.pool.upload import Upload
from model_runner.lora.site import Site
from model_runner.step.layout import Layout

DECODE_ROWS = 16
"""Rows of a tile in static buffers."""

RECENT = 4
"""Plans that are kept: a step has one for its tokens, and one for the rows that need logits."""

Key = tuple[int, bytes, bytes]


@dataclass(eq=False)
class TiledLoraMetadata:
    """A step's work on the device. `h` is the scratch buffer of static metadata; None: the backend's is used.

    `key` identifies the step that the table was written for. Only `key` and the contents of the table change.
    """

    key: Key | None
    tokens: int
    rows: int
    layout: work_table.TableLayout
    table: torch.Tensor
    gather: torch.Tensor | None
    h: torch.Tensor | None = None


class TiledLora(LoraBackend):
    """Launches a shrink and an expand for each site, over the tiles that `cut` returns."""

    name: str

    def __init__(self, pages: RankPagePool, options: Options = DEFAULTS) -> None:
        super().__init__(pages, options)
        device = pages.device
        if device.type != "cuda" and not interpreting():
            raise ConfigError(
                f"--lora-backend {self.name} needs a GPU: take torch, or set TRITON_INTERPRET=1 in the environment"
                " to run its kernels on the CPU, very slowly"
            )
        self._upload = Upload(device)
        self._lanes = LaneTables(pages, options.lane_pages, self._upload)
        self._processors, self._pdl = _device_properties(device)
        self._h = torch.empty(0, dtype=torch.float32, device=device)
        self._recent: dict[Key, TiledLoraMetadata] = {}

    @abstractmethod
    def rows(self, layout: Layout) -> int:
        """Returns the most rows of a tile of this step: 16 to 128, a power of two."""

    @abstractmethod
    def cut(self, layout: Layout, rows: int) -> Tiles:
        """Cuts the step into tiles of at most `rows` rows."""

    @abstractmethod
    def most_tiles(self, tokens: int) -> int:
        """Returns the most tiles of DECODE_ROWS rows into which `tokens` chunks of length 1 can be cut."""

    @property
    def gathers(self) -> bool:
        """Whether the rows of a tile may be scattered over the batch and listed in `gather`."""
        return True

    def plan(self, layout: Layout, into: TiledLoraMetadata | None = None) -> TiledLoraMetadata | None:
        """Returns the step's records in a table on the device, or None when no chunk has a delta and `into` is None."""
        self._lanes.refresh()
        key = (self.pages.version, layout.lanes_C.tobytes(), layout.lengths_C.tobytes())
        if into is None:
            return self._recent.get(key) or self._plan(layout, key)
        if into.key != key:
            assert layout.tokens == layout.chunks == into.tokens, "static buffers are for chunks of length 1"
            self._write(self.cut(layout, DECODE_ROWS), into.layout, into.table)
            into.key = key
        return into

    def static(self, tokens: int) -> TiledLoraMetadata:
        """Returns buffers for any decode step of `tokens` chunks of length 1; they are empty until `plan`."""
        table_layout = work_table.largest_layout(
            self._lanes.most, self.most_tiles(tokens), tokens if self.gathers else 0
        )
        table = torch.zeros(max(1, table_layout.size), dtype=torch.int32, device=self.pages.device)
        gather = table[table_layout.gather_at :] if self.gathers else None
        meta = TiledLoraMetadata(None, tokens, DECODE_ROWS, table_layout, table, gather)
        sites = [site for site in self.pages.sites if site.group in table_layout.groups]
        self._reserve(max((self._scratch_floats(site, meta) for site in sites), default=0))
        meta.h = self._h
        return meta

    def adapt(self, y_TO: torch.Tensor, x: torch.Tensor, site: Site, meta: TiledLoraMetadata) -> None:
        """Launches a shrink and an expand. The embedding has no shrink: the expand looks a token's units up."""
        span = meta.layout.groups.get(site.group)
        if span is None:
            return
        if site.embeds:
            self._expand(y_TO, site, meta, span, 0, x)
            return
        splits = self._shrink(x, site, meta, span) if span.items and site.name in self.pages.pools else 0
        self._expand(y_TO, site, meta, span, splits, None)

    def _plan(self, layout: Layout, key: Key) -> TiledLoraMetadata | None:
        rows = self.rows(layout)
        tiles = self.cut(layout, rows)
        table_layout = work_table.exact_layout(tiles, self._lanes.groups)
        if not table_layout.groups:
            return None
        table = self._write(tiles, table_layout, None)
        gather = table[table_layout.gather_at :] if self.gathers else None
        if len(self._recent) == RECENT:
            del self._recent[next(iter(self._recent))]
        self._recent[key] = TiledLoraMetadata(key, layout.tokens, rows, table_layout, table, gather)
        return self._recent[key]

    def _shrink(self, x_TI: torch.Tensor, site: Site, meta: TiledLoraMetadata, span: work_table.GroupRange) -> int:
        """Launches the shrink into the scratch buffer h. Returns the number of splits."""
        tiling = self._shrink_tiling(site, meta, span)
        if meta.h is None:
            self._reserve(self._scratch_floats(site, meta))
        shrink(
            x_TI,
            self.pages.pools[site.name].a_PSRI,
            self._h if meta.h is None else meta.h,
            meta.table,
            meta.gather,
            self._lanes.site_units(site.name),
            items_at=span.items_at,
            capacity=span.items,
            programs=span.items if meta.h is None else programs(span.items, tiling.splits, self._processors),
            width=span.width,
            tiling=tiling,
            pdl=self._pdl,
        )
        return tiling.splits

    def _expand(
        self,
        y_TO: torch.Tensor,
        site: Site,
        meta: TiledLoraMetadata,
        span: work_table.GroupRange,
        splits: int,
        tokens_T: torch.Tensor | None,
    ) -> None:
        """Launches the expand. `splits` 0: there was no shrink."""
        pool, vectors = self.pages.pools.get(site.name), self.pages.vectors.get(site.name)
        stops = tuple(piece.stop for piece in site.slices)
        tiling = self._expand_tiling(site, meta, span)
        blocks = -(-site.out_features // tiling.block)
        expand(
            y_TO,
            None if tokens_T is not None else self._h if meta.h is None else meta.h,
            None if pool is None else pool.b_PRO,
            meta.table,
            meta.gather,
            None if pool is None else self._lanes.site_units(site.name),
            stops=stops,
            items_at=span.items_at,
            tiles_at=span.tiles_at,
            slots_at=span.slots_at,
            capacity=span.tiles,
            programs=span.tiles if meta.h is None else programs(span.tiles, blocks, self._processors),
            width=span.width,
            splits=max(1, splits),
            tiling=tiling,
            vectors=None if vectors is None else Vectors(vectors.gain_VO, vectors.bias_VO, site.base.bias),
            embedding=None if tokens_T is None or pool is None else (pool.a_PSRI, tokens_T),
            pdl=self._pdl and splits > 0,
        )

    def _expand_tiling(self, site: Site, meta: TiledLoraMetadata, span: work_table.GroupRange) -> ExpandTiling:
        return expand_tiling(
            meta.rows,
            max(piece.width for piece in site.slices),
            site.out_features,
            span.tiles,
            self._lanes.most.get(site.group, 0),
            self.pages.dtype.itemsize,
            self._processors,
        )

    def _shrink_tiling(self, site: Site, meta: TiledLoraMetadata, span: work_table.GroupRange) -> ShrinkTiling:
        return shrink_tiling(
            meta.rows,
            site.in_features,
            len(site.slices),
            span.tiles,
            self._lanes.most[site.group],
            self.pages.dtype.itemsize,
            self._processors,
        )

    def _scratch_floats(self, site: Site, meta: TiledLoraMetadata) -> int:
        """Returns how many floats of scratch the site needs."""
        span = meta.layout.groups[site.group]
        if site.embeds or site.name not in self.pages.pools:
            return 0
        return self._shrink_tiling(site, meta, span).splits * meta.tokens * span.width * len(site.slices) * 16

    def _reserve(self, numbers: int) -> None:
        if self._h.numel() < numbers:
            self._h = torch.empty(numbers, dtype=torch.float32, device=self.pages.device)

    def _write(self, tiles: Tiles, table_layout: work_table.TableLayout, into: torch.Tensor | None) -> torch.Tensor:
        work_table.write(self._upload.buffer(table_layout.size), table_layout, tiles, self._lanes.groups)
        return self._upload.send(table_layout.size, into)


def _device_properties(device: torch.device) -> tuple[int, bool]:
    """Returns the number of multiprocessors, and whether a kernel may start before the one ahead of it ends (PDL)."""
    if interpreting() or device.type != "cuda":
        return INTERPRETED, False
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major >= 9
