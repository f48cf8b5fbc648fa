"""The loop around the core: the only module of the scheduler with sockets and a clock. All decisions are the core's.

inbox --> handle --> plan while the window has room --> outboxes        blocks while no step can be planned
"""

from __future__ import annotations

import gc
import logging
import time
from typing import Any

import msgspec
import zmq

from engine.config.process_configs import SchedulerConfig
from engine.ipc import Inbox, Outbox
from engine.messages import (
    EvictAdapter,
    Hello,
    LoadAdapter,
    Reset,
    RunnerReady,
    Step,
    StepDone,
    ToScheduler,
    UnloadAdapter,
)
from engine.processes.busy_timer import BusyTimer
from engine.processes.child import Child
from scheduler.batching.async_gate import AsyncGate
from scheduler.core import Scheduler
from scheduler.state import Bounds

log = logging.getLogger(__name__)

STATS_SECONDS = 1.0
IDLE_AUDIT_SECONDS = 1.0  # least time between audits while no step is in flight; an audit takes milliseconds
BUSY_AUDIT_SECONDS = 60.0  # least time between audits while steps are in flight
AUDIT_PAGES = 8192  # the most KV pages that one audit checks, so that it takes a few milliseconds


class Outboxes:
    """The sockets to the tokenizer process and the runner, connected to the inbox of each process's last Hello."""

    def __init__(self, context: zmq.Context[Any], config: SchedulerConfig) -> None:
        self._context, self._endpoints = context, config.endpoints
        self._boxes = {
            "tokenizer": Outbox(context, config.endpoints.tokenizer, config.endpoints.max_frame_bytes),
            "runner": Outbox(context, config.endpoints.runner, config.endpoints.max_frame_bytes),
        }

    def hello(self) -> None:
        """Announces this scheduler to both processes. If it replaces an earlier scheduler, also resets the runner."""
        for box in self._boxes.values():
            box.send(Hello("scheduler", self._endpoints.epoch, self._endpoints.scheduler))
        if self._endpoints.epoch > 0:
            self._boxes["runner"].send(Reset(self._endpoints.epoch))

    def connect(self, hello: Hello) -> None:
        """Connects to the inbox of a new incarnation of a process, if its address has changed."""
        old = self._boxes[hello.process]
        if old.address != hello.inbox:
            old.close()
            self._boxes[hello.process] = Outbox(self._context, hello.inbox, self._endpoints.max_frame_bytes)

    def send(self, message: msgspec.Struct) -> None:
        """Sends steps and adapter commands to the runner, and every other message to the tokenizer process."""
        downstream = isinstance(message, Step | LoadAdapter | UnloadAdapter | EvictAdapter)
        self._boxes["runner" if downstream else "tokenizer"].send(message)

    def close(self) -> None:
        """Closes the sockets."""
        for box in self._boxes.values():
            box.close()


class Loop:
    """Moves messages between the inbox, the core and the outboxes."""

    def __init__(self, config: SchedulerConfig, inbox: Inbox[ToScheduler], outboxes: Outboxes) -> None:
        self._config, self._inbox, self._outboxes = config, inbox, outboxes
        self.busy_timer = BusyTimer()
        self._bounds = Bounds(
            config.max_loras,
            config.max_loaded_loras,
            config.lora_host_bytes,
            config.eviction_policy,
            config.lora_max_wait,
            config.max_prefill_tokens,
            prefix_cache=config.prefix_cache,
            schedule_policy=config.schedule_policy,
            tenant_weights=config.tenant_weights,
        )
        self._core: Scheduler | None = None
        self._async_gate = AsyncGate(config.window, hold_back=False)
        self._before_runner: list[ToScheduler] = []  # messages that came before the first RunnerReady
        self._plan_at = float("inf")  # the time at which the next plan is due even if no message comes
        self._stats_at = self._audited = float("-inf")
        self._audit_needed = False  # True if a message was handled since the last audit
        self._stats_changed = False  # True if a message was handled or an audit ran since the last Stats

    def turn(self) -> None:
        """Waits for messages or the next due time, handles the messages, and sends the steps that can be planned."""
        for message in self._inbox.receive(self._poll_seconds()):
            self.busy_timer.tick()
            self._audit_needed = self._stats_changed = True
            if isinstance(message, Hello):
                self._outboxes.connect(message)
            self._handle(message, time.monotonic())
        if self._core is not None:
            self.busy_timer.tick()
            self._plan(self._core)
            self._audit_and_report(self._core, time.monotonic())
        self.busy_timer.idle()

    def _handle(self, message: ToScheduler, now: float) -> None:
        if isinstance(message, RunnerReady):
            self._async_gate = AsyncGate(self._config.window, hold_back=message.capacity.device == "cpu")
        elif isinstance(message, StepDone):
            self._async_gate.step_done(message, now)
        if self._core is not None:
            self._send(self._core.handle(message, now))
        elif isinstance(message, RunnerReady):
            own = self._config.endpoints.epoch
            self._core = Scheduler(message.capacity, self._bounds, self._config.window, message.epoch, own)
            self._send(self._core.drain_outbox())
            for early in self._before_runner:
                self._send(self._core.handle(early, now))
            self._before_runner.clear()
        else:
            self._before_runner.append(message)

    def _plan(self, core: Scheduler) -> None:
        self._plan_at = float("inf")
        while True:
            now, due = time.monotonic(), self._async_gate.due
            if now < due and not core.idle:
                self._plan_at = due
                break
            step = core.plan(now)
            if step is None:
                self._async_gate.nothing_to_plan()
                break
            self._async_gate.step_sent(step, now)
            self._outboxes.send(step)
        self._send(core.drain_outbox())

    def _audit_and_report(self, core: Scheduler, now: float) -> None:
        """Audits the core and sends Stats, each if it is due.

        An audit is due at most each IDLE_AUDIT_SECONDS when no step is in flight, at most each BUSY_AUDIT_SECONDS
        otherwise, and only after changes. Stats are due at most each STATS_SECONDS, after changes and while there are
        requests: during a long load Stats are the only messages.
        """
        if self._audit_needed and now >= self._audit_at(core):
            core.check(AUDIT_PAGES)
            self._audit_needed, self._stats_changed, self._audited = False, True, now
        if self._wants_stats(core) and now >= self._stats_at:
            self._outboxes.send(core.stats())
            self._stats_changed, self._stats_at = False, now + STATS_SECONDS

    def _poll_seconds(self) -> float | None:
        """Returns the seconds until Stats, an audit or a plan are due; None if none is due before a message comes."""
        if self._core is None:
            return None
        due = min(
            self._stats_at if self._wants_stats(self._core) else float("inf"),
            self._audit_at(self._core) if self._audit_needed else float("inf"),
            self._plan_at,
        )
        return None if due == float("inf") else max(0.001, due - time.monotonic())

    def _wants_stats(self, core: Scheduler) -> bool:
        return self._stats_changed or core.has_requests

    def _audit_at(self, core: Scheduler) -> float:
        return self._audited + (IDLE_AUDIT_SECONDS if core.idle else BUSY_AUDIT_SECONDS)

    def _send(self, messages: list[Any]) -> None:
        for message in messages:
            self._outboxes.send(message)


def serve(config: SchedulerConfig, child: Child) -> None:
    """Runs the loop until the process is ended. Raises AssertionError if an audit fails."""
    gc.disable()  # a collection visits all tokens of waiting requests and delays a step; no object is in a cycle
    context: zmq.Context[Any] = zmq.Context()
    inbox: Inbox[ToScheduler] = Inbox(
        context, config.endpoints.scheduler, ToScheduler, config.endpoints.max_frame_bytes
    )
    outboxes = Outboxes(context, config)
    outboxes.hello()
    loop = Loop(config, inbox, outboxes)
    child.ready()
    child.start_heartbeat(loop.busy_timer)
    try:
        while True:
            loop.turn()
    except AssertionError as fault:
        log.critical("the audit of the scheduler's tables failed: %s", fault)
        raise
    finally:
        inbox.close()
        outboxes.close()
        context.term()
