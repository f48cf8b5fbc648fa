"""What a parent knows of the health of a child process, by its reports, and the limits beyond which it is killed.

    phase      begins with     ends with        a process is killed after ... seconds        (see Limits)
                                                without a sign of life | at one piece of work | waiting for others
    starting   its start       Ready | Failed   60                       600                    600
    serving    Ready           its end          5                        120                    -
    stopping   `stop`          its end          the grace that `stop` gives it

A process waits for others while it starts and reports that it is not busy. That is bounded while all others serve, from
its latest piece of work on. Time counts only while the parent itself runs: after it was stopped and continued, it first
reads what the child wrote meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.processes.child import Failed, Heartbeat, Ready


@dataclass(frozen=True)
class Limits:
    """Seconds after which a process is killed: without a line of it, at one piece of work, waiting for others."""

    silent: int
    busy: float
    waiting: int | None = None


STARTING = Limits(silent=60, busy=600.0, waiting=600)
"""Importing a large library from a slow disk blocks all threads. A piece of work: a tensor, a kernel, an adapter."""
SERVING = Limits(silent=5, busy=120.0)


@dataclass(frozen=True)
class ProcessExit:
    """How a process ended. `own_fault` is False after an orderly end and after a signal from outside (`kill -9`)."""

    description: str
    own_fault: bool


class VitalSigns:
    """What is known of a process's health: seconds without a line, at its present work, and of waiting for others."""

    def __init__(self) -> None:
        self._silent = self._waiting = 0
        self._busy = 0.0
        self._begun = -1
        self._is_idle = False

    def hear(self, report: Ready | Failed | Heartbeat | None) -> None:
        """Notes a line of the process; None: a line that is no report."""
        self._silent = 0
        if isinstance(report, Heartbeat):
            self._busy, self._is_idle = report.busy, report.busy == 0 and report.begun == self._begun
            self._begun = report.begun
        elif report is not None:
            self._busy, self._is_idle = 0.0, False

    def count_second(self, others_serve: bool) -> None:
        """Counts a second in which this process, the parent, ran."""
        self._silent += 1
        self._waiting = self._waiting + 1 if self._is_idle and others_serve else 0

    def fault(self, limits: Limits) -> ProcessExit | None:
        """Returns the end of a process beyond its limits, or None if it is within them."""
        if self._busy > limits.busy:
            return ProcessExit(f"was stuck for {self._busy:.0f} seconds and was killed", own_fault=True)
        if self._silent >= limits.silent:
            return ProcessExit(f"gave no sign of life for {self._silent} seconds and was killed", own_fault=False)
        if limits.waiting is not None and self._waiting >= limits.waiting:
            what = "waited for the others, which serve already,"
            return ProcessExit(f"{what} for {self._waiting} seconds and was killed", own_fault=False)
        return None
