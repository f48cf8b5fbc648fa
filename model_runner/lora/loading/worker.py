"""The main loop of a loader process: executes one load job after the other, within a memory limit.

Does not depend on adapter ids, adapter names, pages and steps.
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

from engine.directory import Directory
from engine.errors import EngineError, StorageFailed, is_server_fault
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.loading.adapter_reader import AdapterReader
from model_runner.lora.loading.messages import MAX_PACKET, Loaded, LoaderConfig, LoadJob, Refused, Surveyed
from model_runner.platform.device import DTYPES

DATA_BYTES = 2 << 30
BYTES_PER_ELEMENT = 16
"""Bytes for each element of the model's largest matrix, enough for a few copies of the matrix.

With DATA_BYTES this is the private memory that a loader may use beyond that of an idle loader. Headers are checked
before anything is allocated, so this limit is a second line of defence. Shared memory does not count."""

MAX_REASON = 2000

log = logging.getLogger(__name__)


def serve(config: LoaderConfig) -> None:
    """Executes load jobs until the runner closes the socket or dies."""
    torch.set_num_threads(1)
    catalogue = Catalogue([shape.site() for shape in config.sites])
    _bound_memory(max((math.prod(site.base.shape) for site in catalogue.sites.values()), default=0))
    model = Path(config.model) if config.model else None
    reader = AdapterReader(catalogue, DTYPES[config.dtype], config.limits, model, config.served_names)
    gone = contextlib.suppress(ConnectionError)  # the runner died with packets unread
    with gone, socket.socket(fileno=config.socket) as link, torch.inference_mode():
        while packet := link.recv(MAX_PACKET):
            _do_job(link, reader, msgspec.msgpack.decode(packet, type=LoadJob))


def _do_job(link: socket.socket, reader: AdapterReader, job: LoadJob) -> None:
    def announce(size: int) -> None:
        link.send(msgspec.msgpack.encode(Surveyed(job.job, size)))

    try:
        with Directory(job.root, job.roots) as directory:
            adapter = reader.read(reader.survey(directory), job.revision, announce)
    except Exception as error:
        server_fault = isinstance(error, StorageFailed) or is_server_fault(error)
        link.send(msgspec.msgpack.encode(Refused(job.job, _reason(error)[:MAX_REASON], server_fault)))
        return
    try:
        loaded = Loaded(job.job, adapter.tensor_bytes, adapter.manifest_bytes)
        socket.send_fds(link, [msgspec.msgpack.encode(loaded)], [adapter.descriptor])
    finally:
        adapter.close()


def _reason(error: Exception) -> str:
    if isinstance(error, EngineError):
        return error.message
    if isinstance(error, OSError):
        return str(error)
    log.exception("an unexpected error while loading")
    return f"{type(error).__name__}: {error}"


def _bound_memory(largest: int) -> None:
    """Limits the private memory of this process. `largest`: elements of the model's largest matrix."""
    data_pages = int(Path("/proc/self/statm").read_text().split()[5])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = data_pages * resource.getpagesize() + DATA_BYTES + BYTES_PER_ELEMENT * largest
    if hard == resource.RLIM_INFINITY or bound < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
