"""The runner process: model up, then messages in order until the parent is gone.

A step is launched as soon as it comes and answered as soon as it has ended, whatever was launched behind it:

    GPU     launch n | launch n+1 | ... n ends: answer n | launch n+2 | ... n+1 ends: answer n+1
    CPU     launching computes: n | answer n | n+1, which lies in the inbox | answer n+1

A fault in a step ends the process: its state can no longer be trusted, and whoever sent the step can rebuild it. An
adapter that cannot be loaded hurts that adapter only.
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

from engine.config.sections import RunnerConfig
from engine.errors import EngineError
from engine.ipc import Inbox, Outbox
from engine.messages import (
    AdapterState,
    EvictAdapter,
    Hello,
    LoadAdapter,
    Ping,
    Reset,
    RunnerReady,
    Step,
    ToRunner,
    UnloadAdapter,
)
from engine.processes.child import Child, Facts
from engine.processes.pulse import Pulse
from model_runner import memory_plan
from model_runner.platform.compilations import CompilationCounter
from model_runner.platform.device import set_threads
from model_runner.runner import Flight, Runner
from model_runner.warmup import warm_up

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.00005  # between two looks at the inbox and the device while a step runs on it
SCHEDULERS = 1 << 20  # an epoch for each pair of incarnations: ours, and the scheduler's that we serve


def serve(child: Child, config: RunnerConfig) -> None:
    """Loads, reports, and handles messages for ever. Ends with 0 on SIGTERM, with 1 on a fault."""
    signal.signal(signal.SIGTERM, _exit)
    context: zmq.Context[Any] = zmq.Context()
    links = config.links
    inbox: Inbox[Any] = Inbox(context, links.runner, ToRunner, links.max_frame_bytes)  # first: nothing sent is lost
    try:
        began = time.perf_counter()
        set_threads(config.cpu_threads)
        compilations = CompilationCounter().install()
        runner = Runner.load(config, progress=True)
        if runner.capacity.device == "cuda":
            warm_up(runner, progress=True)
            log.info("device memory: %s", memory_plan.shares(runner.memory()))
        server = Server(runner, inbox, context, config)
        server.announce()
    except Exception as error:
        if not isinstance(error, EngineError):
            log.exception("the model runner cannot start")
        child.failed(error)
        sys.exit(1)
    runner.start_loader()
    compilations.serving = True
    child.ready(facts(runner, time.perf_counter() - began))
    child.keep_pulse(server.pulse)
    try:
        server.loop()
    except Exception:
        log.exception("the model runner ends by its own fault")
        os._exit(1)  # at once: a broken device may hold up an orderly end until it looks like somebody else's doing


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def facts(runner: Runner, seconds: float) -> Facts:
    """What a person would like to read."""
    c = runner.capacity
    return {
        "family": runner.family,
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

    Its epoch changes with each scheduler that it is reset for: steps that a dead one left behind are of no epoch that
    counts, wherever in the inbox they stand.
    """

    def __init__(self, runner: Runner, inbox: Inbox[Any], context: zmq.Context[Any], config: RunnerConfig) -> None:
        self._runner = runner
        self._inbox = inbox
        self._context = context
        self._config = config
        self._epoch = config.links.epoch * SCHEDULERS
        self.pulse = Pulse()
        self._scheduler = self._connect(config.links.scheduler)
        self._flights: deque[Flight] = deque()

    def announce(self) -> None:
        """Tells the scheduler who this is and what it can hold."""
        links = self._config.links
        self._scheduler.send(Hello("runner", links.epoch, links.runner, self._config.rank))
        after_fault = self._config.after_fault
        self._scheduler.send(RunnerReady(epoch=self._epoch, capacity=self._runner.capacity, after_fault=after_fault))

    def loop(self) -> NoReturn:
        """Handles messages in order, and goes on with fills and loads after each and while idle, for ever."""
        if self._runner.descriptor is not None:
            self._inbox.watch(self._runner.descriptor)
        while True:
            for message in self._inbox.receive(0.0 if self._flights else self._runner.wait):
                self.handle(message)
                self._answer()
                self._advance()
            self._answer()
            self._advance()
            if self._flights:
                time.sleep(LOOK_SECONDS)

    def handle(self, message: ToRunner) -> None:
        """Does one message and answers it."""
        match message:
            case Step():
                self._launch(message)
            case LoadAdapter():
                self._load(message)
            case UnloadAdapter():
                self._tell(self._runner.unload_adapter(message))
            case EvictAdapter():
                self._tell(self._runner.evict_adapter(message))
            case Reset():
                self._reset(message)
            case Ping():
                self._scheduler.send(Ping(self._epoch))
            case Hello():
                self._meet(message)

    def _connect(self, address: str) -> Outbox:
        return Outbox(self._context, address, self._config.links.max_frame_bytes)

    def _launch(self, step: Step) -> None:
        if step.epoch != self._epoch:
            log.warning("step %d is for epoch %d: dropped", step.id, step.epoch)
            return
        self.pulse.tick()
        try:
            self._flights.append(self._runner.launch(step))
        except Exception:
            log.exception("step %d of %d chunks failed: the runner ends", step.id, len(step.chunks))
            raise

    def _answer(self) -> None:
        """Answers the steps that have ended; never waits."""
        while self._flights and self._flights[0].arrival.is_done:
            flight = self._flights.popleft()
            try:
                done = self._runner.finish(flight)
            except Exception:
                log.exception("step %d failed on the device: the runner ends", flight.id)
                raise
            self._scheduler.send(done)
            self.pulse.tick()
        if not self._flights:
            self.pulse.rest()

    def _drop_flights(self) -> None:
        """Waits for what runs; nobody asks for it any more."""
        while self._flights:
            self._runner.finish(self._flights.popleft())

    def _load(self, message: LoadAdapter) -> None:
        state = self._runner.load_adapter(message)
        if state is not None:
            self._tell(state)

    def _advance(self) -> None:
        for state in self._runner.advance():
            self._tell(state)

    def _tell(self, state: AdapterState) -> None:
        self._scheduler.send(replace(state, epoch=self._epoch))

    def _reset(self, message: Reset) -> None:
        """Another scheduler: nothing of the one before counts."""
        self._drop_flights()
        self._epoch = self._config.links.epoch * SCHEDULERS + message.epoch
        self._runner.reset()
        self._scheduler.send(RunnerReady(epoch=self._epoch, capacity=self._runner.capacity))

    def _meet(self, hello: Hello) -> None:
        """A scheduler whose inbox is elsewhere is a new one: it is answered there from now on."""
        if hello.process == "scheduler" and hello.inbox != self._scheduler.address:
            self._scheduler.close()
            self._scheduler = self._connect(hello.inbox)
