"""The messages between a runner and its loader children, over a SOCK_SEQPACKET pair: one message per packet.

    runner                                        loader
      | -- LoaderConfig, a JSON line on stdin ----->|   once; the end of stdin ends the child
      | -- LoadJob -------------------------------->|
      |<-- Surveyed --------------------------------|   config and headers are valid; `bytes` are left to read
      |<-- Loaded, with the descriptor of the memory|   or Refused

Packets are small; the manifest, which may be long, is in the shared memory after the tensors.
"""

from __future__ import annotations

import msgspec
import torch

from engine.config.server_args import LogLevel
from model_runner.lora.loading.limits import Limits
from model_runner.lora.site import EMBED, NORMS, Site, Slice
from model_runner.quantization.plain import Plain

MAX_PACKET = 32 << 10


class SiteShape(msgspec.Struct, frozen=True, array_like=True):
    """A site without its weights; `slices` are (module, start, stop)."""

    name: str
    path: str
    layer: int
    group: str
    slices: list[tuple[str, int, int]]
    out_features: int
    in_features: int
    tied: bool = False

    @classmethod
    def of(cls, site: Site) -> SiteShape:
        """Returns the shape of `site`."""
        slices = [(piece.module, piece.start, piece.stop) for piece in site.slices]
        sizes = site.out_features, site.in_features
        return cls(site.name, site.path, site.layer, site.group, slices, *sizes, tied=site.tied)

    def site(self) -> Site:
        """Returns a site of this shape, with its weight on the meta device."""
        shape = (self.out_features,) if self.group == NORMS else (self.out_features, self.in_features)
        weight = torch.empty(shape[::-1] if self.group == EMBED else shape, device="meta")
        slices = tuple(Slice(*s) for s in self.slices)
        return Site(self.name, self.path, self.layer, self.group, slices, Plain(weight), tied=self.tied)


class LoaderConfig(msgspec.Struct, frozen=True):
    """The configuration of a loader: the model's sites, directory and names, and the descriptor of its socket."""

    sites: list[SiteShape]
    dtype: str
    limits: Limits
    model: str = ""
    served_names: list[str] = []
    socket: int = -1
    log_level: LogLevel = "info"


class Packet(msgspec.Struct, tag=True, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One message. `job` is the number that the runner gave the job."""

    job: int


class LoadJob(Packet, frozen=True):
    """Orders a loader to read the adapter in `root`; `revision`, when not empty, must be the hash of its files.

    With `roots` the real path of every file must lie under one of them.
    """

    root: str
    revision: str = ""
    roots: list[str] = []


class Surveyed(Packet, frozen=True):
    """Config and headers are valid, and `bytes` of tensors are left to read."""

    bytes: int


class Loaded(Packet, frozen=True):
    """The adapter is loaded. The packet carries the descriptor of the shared memory: the tensors, then the manifest."""

    tensor_bytes: int
    manifest_bytes: int


class Refused(Packet, frozen=True):
    """The adapter cannot be served, for the `reason` given; `server_fault`: it lies in this server, not the adapter."""

    reason: str
    server_fault: bool = False
