"""The loader process: one job after the other, bounded in memory.

Knows nothing of ids, names, pages and steps.
"""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import socket
from pathlib import Path

import msgspec
import torch

from engine.errors import EngineError
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.transfer.messages import MAX_PACKET, Loaded, LoaderConfig, LoadJob, Refused, Surveyed
from model_runner.lora.transfer.reader import Reader
from model_runner.platform.device import DTYPES

DATA_BYTES = 2 << 30
LARGEST = 16
"""Bytes for each number of the model's largest matrix: a few copies of one like it.

Private memory beyond what an idle loader has: a backstop, as headers are checked first. Parcels do not count."""

MAX_REASON = 2000

log = logging.getLogger(__name__)


def serve(config: LoaderConfig) -> None:
    """Does jobs until the runner hangs up, or is gone."""
    torch.set_num_threads(1)
    catalogue = Catalogue([shape.site() for shape in config.sites])
    _bound_memory(max((math.prod(site.base.shape) for site in catalogue.sites.values()), default=0))
    reader = Reader(catalogue, DTYPES[config.dtype], config.limits, Path(config.model) if config.model else None)
    gone = contextlib.suppress(ConnectionError)  # killed with words of ours unread
    with gone, socket.socket(fileno=config.socket) as link, torch.inference_mode():
        while packet := link.recv(MAX_PACKET):
            _do(link, reader, msgspec.msgpack.decode(packet, type=LoadJob))


def _do(link: socket.socket, reader: Reader, job: LoadJob) -> None:
    def announce(size: int) -> None:
        link.send(msgspec.msgpack.encode(Surveyed(job.job, size)))

    try:
        parcel = reader.read(Path(job.root), job.revision, announce)
    except Exception as error:
        link.send(msgspec.msgpack.encode(Refused(job.job, _reason(error)[:MAX_REASON])))
        return
    try:
        loaded = Loaded(job.job, parcel.tensors, parcel.label)
        socket.send_fds(link, [msgspec.msgpack.encode(loaded)], [parcel.descriptor])
    finally:
        parcel.close()


def _reason(error: Exception) -> str:
    if isinstance(error, EngineError):
        return error.message
    if isinstance(error, OSError):
        return str(error)
    log.exception("a fault while loading")
    return f"{type(error).__name__}: {error}"


def _bound_memory(largest: int) -> None:
    data_pages = int(Path("/proc/self/statm").read_text().split()[5])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = data_pages * resource.getpagesize() + DATA_BYTES + LARGEST * largest
    if hard == resource.RLIM_INFINITY or bound < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
