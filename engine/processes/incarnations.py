"""The config and the inbox address of each incarnation of the three processes. A socket path is never bound twice.

    <directory>/runner.0  runner.1  ...   on a reused path a process could get its predecessor's queue, or lose its own
    <directory>/clients.0                 where clients connect; the same path for every tokenizer incarnation

A new incarnation gets the current addresses of its neighbours and sends them Hello. The processes are started by
engine.processes.supervisor. If the directory is deleted, it is made again, and every process binds its socket again
(engine.ipc): at the same path, so that its neighbours and clients find it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec.structs import replace

from engine.config.process_configs import Endpoints, LoraPoolSizes, ProcessConfigs
from engine.errors import EngineDead
from engine.ipc import KEEP_SECONDS, is_private
from engine.journal.journal import Journal
from engine.journal.memory_file import MemoryFile
from engine.journal.work_notes import WorkNotes
from engine.processes import run_directory
from engine.processes.child import Facts
from engine.processes.process import ProcessSpec
from engine.processes.supervisor import SpecFactory

log = logging.getLogger(__name__)


class Addresses:
    """The inbox addresses under a run directory, by process and incarnation."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._current = {"tokenizer": 0, "scheduler": 0, "runner": 0}

    def start_incarnation(self, process: str, incarnation: int) -> Endpoints:
        """Assigns the address of a process's new incarnation. Returns the endpoints for its config.

        Raises EngineDead if the directory was deleted and cannot be made again.
        """
        if not self.restore():
            raise EngineDead(f"the run directory {self._directory} was deleted and cannot be made again")
        self._current[process] = incarnation
        return self.endpoints(incarnation)

    def endpoints(self, epoch: int = 0) -> Endpoints:
        """Returns the current addresses, for a process of incarnation `epoch`."""
        tokenizer, scheduler, runner = (f"ipc://{self._directory}/{name}.{n}" for name, n in self._current.items())
        zmq_server = f"ipc://{self._directory}/clients.0"
        return Endpoints(epoch=epoch, tokenizer=tokenizer, scheduler=scheduler, runner=runner, zmq_server=zmq_server)

    def restore(self) -> bool:
        """Makes the directory again if it was deleted. Returns whether it is there, and private to this user."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True)
            run_directory.lock(self._directory)  # held until this process ends
            log.warning("the run directory %s was deleted and is made again", self._directory)
        return is_private(str(self._directory))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """While entered, makes the directory again within KEEP_SECONDS if it is deleted."""
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(KEEP_SECONDS):
                self.restore()

        thread = threading.Thread(target=keep, name="run directory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class Incarnations:
    """Creates the ProcessSpec of each incarnation of the three processes of one launch.

    `journal` are the files of the journal of adapters, from which a new tokenizer process learns what to serve.
    """

    def __init__(self, resolved: ProcessConfigs, addresses: Addresses, journal: Sequence[MemoryFile]) -> None:
        self._resolved = resolved
        self._addresses = addresses
        self._journal = journal
        self._work_notes = WorkNotes.new_file()
        self._lora_pool: LoraPoolSizes | None = None

    def keep_sizes(self, runner: Facts) -> None:
        """Keeps the sizes of the first runner's LoRA pool for its successors, given the facts that it reported."""
        match runner:
            case {
                "max_lora_rank": int(rank),
                "lora_targets": list(targets),
                "rank_pages": list(pages),
                "lora_extra_vocab": int(extra),
            } if rank:
                counts = dict(each.rsplit(" ", 1) for each in pages)
                sizes = {group: int(count) for group, count in counts.items()}
                self._lora_pool = LoraPoolSizes(rank, targets, sizes, extra)

    @property
    def spec_factories(self) -> list[SpecFactory]:
        """Returns one factory for each process, in start order: a process may depend on those before it."""
        return [self._runner, self._scheduler, self._tokenizer]

    def _runner(self, incarnation: int, after_fault: bool) -> ProcessSpec:
        endpoints = self._addresses.start_incarnation("runner", incarnation)
        config = replace(self._resolved.runner, endpoints=endpoints, after_fault=after_fault, lora_pool=self._lora_pool)
        return ProcessSpec("model_runner", "model_runner", config, environment=runner_environment())

    def _scheduler(self, incarnation: int, _: bool) -> ProcessSpec:
        config = replace(
            self._resolved.scheduler, endpoints=self._addresses.start_incarnation("scheduler", incarnation)
        )
        return ProcessSpec("scheduler", "scheduler", config)

    def _tokenizer(self, incarnation: int, after_fault: bool) -> ProcessSpec:
        notes = self._work_notes
        config = replace(
            self._resolved.tokenizer,
            endpoints=self._addresses.start_incarnation("tokenizer", incarnation),
            work_notes=None if notes is None else notes.descriptor,
            after_fault=after_fault,
        )
        if incarnation:
            config = replace(config, adapters=Journal(self._journal).sources)
        optional = [each for each in (config.listen_fd, config.work_notes) if each is not None]
        return ProcessSpec(
            "tokenizer",
            "tokenizer_proc",
            config,
            descriptors=[*config.journal, *optional],
            is_excused=lambda: notes is not None and WorkNotes.is_work_noted(notes),
        )


def runner_environment() -> dict[str, str]:
    """Returns environment variables for the runner's OpenMP threads and memory, except those the user has set.

    OpenMP threads spin for about 50 us, longer than the gap between two operations, then sleep. Threads that keep
    spinning compete with the other two processes for cores: with two cores and other load, a decode step of a 0.5B
    shape took 159 ms, and 69 ms with threads that sleep at once; without other load, sleeping at once costs 2% to 8%.
    With glibc, large blocks may use huge pages where the system allows it: linears took 5% less time.
    """
    wait_policy = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ)
    chosen = {} if wait_policy else {"GOMP_SPINCOUNT": "5000"}
    return chosen if "GLIBC_TUNABLES" in os.environ else chosen | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
