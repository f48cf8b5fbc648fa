"""Norms that adapters bring in the place of the base's: slots of whole weights, and what each lane is normed with.

    slots [V, N] float32     every norm of the model side by side, as one adapter has them
    table [lanes + 1, N]     row 0 the base's; of a lane  base + sum over its slots  scale * (slot - base)

The weights of a step's rows are rows of the table, which never moves: a recorded step reads it by lane like any other.
Knows nothing of steps. Legend: V slots, N numbers of all norms, L = lanes + 1, H numbers of one norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from model_runner.lora.site import NORMS, Site

Pairs = Sequence[tuple[int, float]]
"""(slot, scale) of a lane."""


class NormPool:
    """The slots and the table of one model; `refresh` before a step that has lanes."""

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
        self._own: set[int] = set()

    @property
    def bytes(self) -> int:
        """Bytes of slots and table."""
        return self.slots_VN.nbytes + self.table_LN.nbytes

    def table(self, site: Site) -> torch.Tensor:
        """[L, H]: the weight of this norm for each lane."""
        return self.table_LN[:, self._spans[site.name]]

    def base(self, site: Site) -> torch.Tensor:
        """[H] float32 on the host: the base's weight."""
        return self.host_base_N[self._spans[site.name]]

    def slot(self, site: Site, slot: int) -> torch.Tensor:
        """[H] float32 on the device: where an adapter's weight goes."""
        return self.slots_VN[slot, self._spans[site.name]]

    def refresh(self, lanes: Mapping[int, Pairs], version: int) -> None:
        """Brings the table up to date with the lanes that have slots; `version` tells whether they, or what slots hold,
        changed.
        """
        if version == self._version:
            return
        self._version = version
        for lane in self._own - lanes.keys():
            self.table_LN[lane] = self.base_N
        for lane, pairs in lanes.items():
            self.table_LN[lane] = self._weights(pairs)
        self._own = set(lanes)

    def _weights(self, pairs: Pairs) -> torch.Tensor:
        """[N]: those of one adapter as they are, of a mix the sum of what each changes."""
        (slot, scale), *more = pairs
        if scale == 1 and not more:
            return self.slots_VN[slot]
        moved = [(self.slots_VN[slot] - self.base_N) * scale for slot, scale in pairs]
        return self.base_N + torch.stack(moved).sum(0)
