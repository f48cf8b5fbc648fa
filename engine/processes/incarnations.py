"""What the n-th incarnation of each process reads, and where its inbox is: a dead one's socket is never bound again.

    <directory>/runner.0  runner.1  ...   who binds its predecessor's path would inherit its queue, or lose its own
    <directory>/door.0                    the hosts' one: they connect by themselves to whoever binds it
    <directory>/adapters.jsonl            the journal: what became of the adapters since the start

Whoever starts is told where the others are now, and says Hello to them. Knows nothing of processes.
"""

from __future__ import annotations

import os
from pathlib import Path

from msgspec.structs import replace

from engine.config.process_configs import Endpoints, ProcessConfigs
from engine.processes import journal
from engine.processes.process import ProcessSpec
from engine.processes.supervisor import SpecFactory


class Addresses:
    """The inboxes under a run directory, by incarnation."""

    def __init__(self, directory: Path) -> None:
        self.journal = directory / "adapters.jsonl"
        self._directory = directory
        self._now = {"tokenizer": 0, "scheduler": 0, "runner": 0}

    def begin(self, process: str, incarnation: int) -> Endpoints:
        """The links of a process's new incarnation, which the others will find at a new place."""
        self._now[process] = incarnation
        return self.endpoints(incarnation)

    def endpoints(self, epoch: int = 0) -> Endpoints:
        """Where everyone is now, for a process of this incarnation."""
        tokenizer, scheduler, runner = (f"ipc://{self._directory}/{name}.{n}" for name, n in self._now.items())
        door = f"ipc://{self._directory}/door.0"
        return Endpoints(epoch=epoch, tokenizer=tokenizer, scheduler=scheduler, runner=runner, zmq_server=door)


class Incarnations:
    """The three processes of one launch, in the order in which they depend on one another."""

    def __init__(self, resolved: ProcessConfigs, addresses: Addresses) -> None:
        self._resolved = resolved
        self._addresses = addresses

    @property
    def spec_factories(self) -> list[SpecFactory]:
        """For a supervisor."""
        return [self._runner, self._scheduler, self._tokenizer]

    def _runner(self, incarnation: int, after_fault: bool) -> ProcessSpec:
        endpoints = self._addresses.begin("runner", incarnation)
        config = replace(self._resolved.runner, endpoints=endpoints, after_fault=after_fault)
        return ProcessSpec("model_runner", "model_runner", config, environment=runner_environment())

    def _scheduler(self, incarnation: int, _: bool) -> ProcessSpec:
        config = replace(self._resolved.scheduler, endpoints=self._addresses.begin("scheduler", incarnation))
        return ProcessSpec("scheduler", "scheduler", config)

    def _tokenizer(self, incarnation: int, _: bool) -> ProcessSpec:
        config = replace(self._resolved.tokenizer, endpoints=self._addresses.begin("tokenizer", incarnation))
        if incarnation:
            config = replace(config, adapters=journal.replay(self._addresses.journal, config.adapters))
        listen_fd = config.listen_fd
        return ProcessSpec("tokenizer", "tokenizer_proc", config, descriptors=[] if listen_fd is None else [listen_fd])


def runner_environment() -> dict[str, str]:
    """How the runner's threads wait for one another and where its memory comes from, unless the environment says so.

    They spin for some 50 us, which is longer than what lies between two operations, then sleep: threads that spin on
    fight the other two processes for the cores (with two cores and some other load a decode step of a 0.5B shape took
    159 ms, and 69 ms with threads that sleep at once; alone, those that sleep at once lose 2% to 8%). Large blocks may
    be huge pages, where the C library is glibc and the system lets programs ask: linears took 5% less time.
    """
    waits = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ)
    chosen = {} if waits else {"GOMP_SPINCOUNT": "5000"}
    return chosen if "GLIBC_TUNABLES" in os.environ else chosen | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
