"""The runner process: loads the model, then handles messages in order until its parent ends.

A step is launched as soon as it comes and answered as soon as it has ended, whatever was launched behind it:

    GPU     launch n | launch n+1 | ... n ends: answer n | launch n+2 | ... n+1 ends: answer n+1
    CPU     a launch computes: n | answer n | n+1, which waits in the inbox | answer n+1

An error in a step ends the process: its state can no longer be trusted, and the scheduler can rebuild it in a new one.
An adapter that cannot be loaded fails alone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import deque
from types import FrameType
from typing import Any, NoReturn

import zmq
from msgspec.structs import replace

from engine.config.process_configs import RunnerConfig
from engine.errors import EngineError
from engine.ipc import Inbox, Outbox
from engine.messages import (
    AdapterState,
    EvictAdapter,
    Hello,
    LoadAdapter,
    Reset,
    RunnerReady,
    Step,
    ToRunner,
    UnloadAdapter,
)
from engine.processes.busy_timer import BusyTimer
from engine.processes.child import Child, Facts
from model_runner.build.memory_plan import describe_bytes
from model_runner.launched_step import LaunchedStep
from model_runner.platform.compilations import CompilationCounter
from model_runner.platform.device import set_threads
from model_runner.runner import Runner
from model_runner.warmup import warm_up

log = logging.getLogger(__name__)

POLL_SECONDS = 0.00005
"""Between two polls of the inbox and the device while a step runs."""

SCHEDULER_EPOCHS = 1 << 20
"""An epoch is the runner's incarnation times this, plus the scheduler's incarnation that it serves."""


def serve(child: Child, config: RunnerConfig, starting: BusyTimer) -> None:
    """Loads, reports, and handles messages for ever. Exits with 0 on SIGTERM, with 1 on an error.

    `starting` is the busy_timer until the report.
    """
    signal.signal(signal.SIGTERM, _exit)
    context: zmq.Context[Any] = zmq.Context()
    # The inbox is bound before anything is loaded, so that no message is lost.
    inbox: Inbox[Any] = Inbox(context, config.endpoints.runner, ToRunner, config.endpoints.max_frame_bytes)
    compilations = CompilationCounter().install()
    began = time.perf_counter()
    try:
        runner = _load_runner(config, starting)
        server = Server(runner, inbox, context, config)
        server.announce()
    except Exception as error:
        if not isinstance(error, EngineError):
            log.exception("the model runner cannot start")
        child.failed(error)
        sys.exit(1)
    runner.adapters.start()
    compilations.serving = True
    child.ready(facts(runner, time.perf_counter() - began))
    child.start_heartbeat(server.busy_timer)
    try:
        server.loop()
    except Exception:
        log.exception("the model runner ends by its own fault")
        os._exit(1)  # an orderly end may hang on a broken device, and the cause would look like another process's


def _load_runner(config: RunnerConfig, starting: BusyTimer) -> Runner:
    """A runner that is ready to serve: on a GPU, warmed up."""
    set_threads(config.cpu_threads)
    runner = Runner.load(config, progress=starting)
    if runner.capacity.device == "cuda":
        warm_up(runner, progress=starting)
        log.info("device memory: %s", describe_bytes(runner.memory()))
    return runner


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def facts(runner: Runner, seconds: float) -> Facts:
    """What the launch banner shows."""
    c = runner.capacity
    return {
        "family": runner.parts.decoder.config.family,
        "device": c.device,
        "dtype": c.dtype,
        "attention_backend": c.attention_backend,
        "lora_backend": c.lora_backend,
        "weight_bytes": c.weight_bytes,
        "kv_bytes": c.kv_bytes,
        "kv_pages": c.kv_pages,
        "kv_tokens": c.kv_pages * c.page_size,
        "rows": c.rows,
        "max_length": c.max_length,
        "max_batched_tokens": c.max_batched_tokens,
        "max_loras": c.max_loras,
        "max_lora_rank": c.max_lora_rank,
        "lora_targets": c.lora_targets,
        "lora_bytes": c.lora_bytes,
        "rank_pages": [f"{group} {count}" for group, count in c.rank_pages.items()],
        "graph_rows": runner.graph_sizes[-1] if runner.graph_sizes else 0,
        "load_seconds": round(seconds, 3),
    }


class Server:
    """A loaded runner behind its inbox, and the scheduler it answers.

    Each scheduler that it is reset for has its own epoch. Steps of a dead scheduler that are still in the inbox have an
    old epoch and are dropped.
    """

    def __init__(self, runner: Runner, inbox: Inbox[Any], context: zmq.Context[Any], config: RunnerConfig) -> None:
        self._runner = runner
        self._inbox = inbox
        self._context = context
        self._config = config
        self._epoch = config.endpoints.epoch * SCHEDULER_EPOCHS
        self.busy_timer = BusyTimer()
        self._scheduler = self._connect(config.endpoints.scheduler)
        self._launched: deque[LaunchedStep] = deque()

    def announce(self) -> None:
        """Sends the scheduler this process's address and what the runner can hold."""
        endpoints = self._config.endpoints
        self._scheduler.send(Hello("runner", endpoints.epoch, endpoints.runner, self._config.rank))
        after_fault = self._config.after_fault
        self._scheduler.send(RunnerReady(epoch=self._epoch, capacity=self._runner.capacity, after_fault=after_fault))

    def loop(self) -> NoReturn:
        """Handles messages in order, and continues fills and loads after each and while idle, for ever."""
        if self._runner.adapters.descriptor is not None:
            self._inbox.watch(self._runner.adapters.descriptor)
        while True:
            for message in self._inbox.receive(0.0 if self._launched else self._runner.poll_seconds):
                self.handle(message)
                self._answer()
                self._advance()
            self._answer()
            self._advance()
            if self._launched:
                time.sleep(POLL_SECONDS)

    def handle(self, message: ToRunner) -> None:
        """Handles one message and answers it."""
        match message:
            case Step():
                self._launch(message)
            case LoadAdapter():
                self._load(message)
            case UnloadAdapter():
                self._report(self._runner.adapters.unload(message.adapter_id))
            case EvictAdapter():
                self._report(self._runner.adapters.evict(message.adapter_id))
            case Reset():
                self._reset(message)
            case Hello():
                self._greet(message)

    def _connect(self, address: str) -> Outbox:
        return Outbox(self._context, address, self._config.endpoints.max_frame_bytes)

    def _launch(self, step: Step) -> None:
        if step.epoch != self._epoch:
            log.warning("step %d is for epoch %d: dropped", step.id, step.epoch)
            return
        self.busy_timer.tick()
        try:
            self._launched.append(self._runner.launch(step))
        except Exception:
            log.exception("step %d of %d chunks failed: the runner ends", step.id, len(step.chunks))
            raise

    def _answer(self) -> None:
        """Sends the answers of steps that have ended; never waits."""
        while self._launched and self._launched[0].done.is_done:
            launched = self._launched.popleft()
            try:
                done = self._runner.finish(launched)
            except Exception:
                log.exception("step %d failed on the device: the runner ends", launched.id)
                raise
            self._scheduler.send(done)
            self.busy_timer.tick()
        if not self._launched:
            self.busy_timer.idle()

    def _drain_launched(self) -> None:
        """Waits for the launched steps, whose answers no scheduler needs."""
        while self._launched:
            self._runner.finish(self._launched.popleft())

    def _load(self, message: LoadAdapter) -> None:
        state = self._runner.adapters.load(message)
        if state is not None:
            self._report(state)

    def _advance(self) -> None:
        for state in self._runner.advance():
            self._report(state)

    def _report(self, state: AdapterState) -> None:
        self._scheduler.send(replace(state, epoch=self._epoch))

    def _reset(self, message: Reset) -> None:
        """Starts the next epoch, for another scheduler: forgets the rows and steps of the one before."""
        self._drain_launched()
        self._epoch = self._config.endpoints.epoch * SCHEDULER_EPOCHS + message.epoch
        self._runner.reset()
        self._scheduler.send(RunnerReady(epoch=self._epoch, capacity=self._runner.capacity))

    def _greet(self, hello: Hello) -> None:
        """A scheduler with another inbox address is a new one: connects to it."""
        if hello.process == "scheduler" and hello.inbox != self._scheduler.address:
            self._scheduler.close()
            self._scheduler = self._connect(hello.inbox)
