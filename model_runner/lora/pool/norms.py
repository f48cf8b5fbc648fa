"""Norm weights that adapters bring in the place of the base's: slots of full weights, and a table of weights by lane.

    slots [V, N] float32     every norm of the model side by side, as one adapter has them
    table [lanes + 1, N]     row 0: the base; other rows: base + sum over the lane's slots  scale * (slot - base)

The norm weights of a step's rows are rows of the table. Its address never changes, so a captured step reads it by lane
as an eager step does. Legend: V slots, N numbers of all norms, L = lanes + 1, H numbers of one norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from model_runner.lora.site import NORMS, Site

Pairs = Sequence[tuple[int, float]]
"""The (slot, scale) pairs of a lane."""


class NormPool:
    """The slots and the table of one model. Call `refresh` before a step that has lanes."""

    def __init__(self, sites: Sequence[Site], slots: int, max_lanes: int, device: torch.device) -> None:
        norms = [site for site in sites if site.group == NORMS]
        base_N = torch.cat([site.base.dequantize() for site in norms])
        self.host_base_N = base_N.float().cpu()
        self.base_N = self.host_base_N.to(device)
        self.slots_VN = self.base_N.repeat(slots, 1)
        self.table_LN = base_N.to(device).repeat(max_lanes + 1, 1)
        self._spans: dict[str, slice] = {}
        begin = 0
        for site in norms:
            self._spans[site.name] = slice(begin, begin + site.out_features)
            begin += site.out_features
        self._version = -1
        self._lanes_with_slots: set[int] = set()

    @property
    def bytes(self) -> int:
        """Bytes of slots and table."""
        return self.slots_VN.nbytes + self.table_LN.nbytes

    def table(self, site: Site) -> torch.Tensor:
        """Returns the weight of this norm for each lane, [L, H]."""
        return self.table_LN[:, self._spans[site.name]]

    def base(self, site: Site) -> torch.Tensor:
        """Returns the base's weight of this norm, [H] float32 on the host."""
        return self.host_base_N[self._spans[site.name]]

    def slot(self, site: Site, slot: int) -> torch.Tensor:
        """Returns the place of an adapter's weight of this norm, [H] float32 on the device."""
        return self.slots_VN[slot, self._spans[site.name]]

    def refresh(self, lanes: Mapping[int, Pairs], version: int) -> None:
        """Updates the table for the lanes that have slots. Does nothing if `version` is the same as before."""
        if version == self._version:
            return
        self._version = version
        for lane in self._lanes_with_slots - lanes.keys():
            self.table_LN[lane] = self.base_N
        for lane, pairs in lanes.items():
            self.table_LN[lane] = self._weights(pairs)
        self._lanes_with_slots = set(lanes)

    def _weights(self, pairs: Pairs) -> torch.Tensor:
        """Returns the norm weights of a lane, [N]: of one adapter as they are; of a mix, base plus scaled changes."""
        (slot, scale), *more = pairs
        if scale == 1 and not more:
            return self.slots_VN[slot]
        changes = [(self.slots_VN[slot] - self.base_N) * scale for slot, scale in pairs]
        return self.base_N + torch.stack(changes).sum(0)
