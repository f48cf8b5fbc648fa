"""The runner process: loads the model, then handles messages in order until its parent ends.

A step is launched as soon as it arrives, and its StepDone is sent as soon as it has ended, even if later steps run:

    GPU     launch n | launch n+1 | ... n ends: send n | launch n+2 | ... n+1 ends: send n+1
    CPU     launch n, which computes it; meanwhile n+1 waits in the inbox | send n | launch n+1 | send n+1

An error in a step ends the process: its state may be wrong, and the scheduler can rebuild the state in a new process.
An adapter that cannot be loaded is reported as failed and affects nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from typing import Any

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
from engine.processes.child import Child, Facts, leave
from model_runner.build.memory_plan import describe_bytes
from model_runner.launched_step import LaunchedStep
from model_runner.platform.compilations import CompilationCounter
from model_runner.platform.device import set_threads
from model_runner.runner import Runner
from model_runner.warmup import warm_up

log = logging.getLogger(__name__)

POLL_SECONDS = 0.00005
"""The seconds between two polls of the inbox and the device while a step runs."""

SCHEDULER_EPOCHS = 1 << 20
"""The factor in an epoch: the runner's incarnation * SCHEDULER_EPOCHS + the incarnation of the scheduler it serves."""


def serve(child: Child, config: RunnerConfig, starting: BusyTimer) -> None:
    """Loads the model, reports Ready, and handles messages until the parent asks to stop. Exits with 1 on an error.

    `starting` is the busy timer of the startup.
    """
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
    child.on_stop = server.stop
    child.ready(facts(runner, time.perf_counter() - began))
    child.start_heartbeat(server.busy_timer)
    try:
        server.loop()
    except Exception:
        log.exception("the model runner ends by its own fault")
        leave(1)  # an orderly exit may hang on a broken device, and hide the cause


def _load_runner(config: RunnerConfig, starting: BusyTimer) -> Runner:
    """Loads the runner and, on a GPU, warms it up."""
    set_threads(config.cpu_threads)
    runner = Runner.load(config, progress=starting)
    if runner.capacity.device == "cuda":
        warm_up(runner, progress=starting)
        log.info("device memory: %s", describe_bytes(runner.memory()))
    return runner


def facts(runner: Runner, seconds: float) -> Facts:
    """Returns the runner's values for the launch banner; `seconds` is the duration of the startup."""
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
        "lora_extra_vocab": lora.pages.extra_vocab if (lora := runner.parts.lora) is not None else 0,
        "rank_pages": [f"{group} {count}" for group, count in c.rank_pages.items()],
        "graph_rows": runner.graph_sizes[-1] if runner.graph_sizes else 0,
        "load_seconds": round(seconds, 3),
    }


class Server:
    """Connects a loaded runner to its inbox and to the scheduler's.

    Each Reset by a new scheduler begins a new epoch. Steps of a dead scheduler that are still in the inbox have an old
    epoch and are dropped.
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
        self._stop_signal = os.pipe()
        self._is_stopping = False

    def stop(self) -> None:
        """Ends `loop`, from another thread."""
        self._is_stopping = True
        os.write(self._stop_signal[1], b".")

    def announce(self) -> None:
        """Sends the scheduler Hello, with this process's address, and RunnerReady, with the runner's capacity."""
        endpoints = self._config.endpoints
        self._scheduler.send(Hello("runner", endpoints.epoch, endpoints.runner, self._config.rank))
        after_fault = self._config.after_fault
        self._scheduler.send(RunnerReady(epoch=self._epoch, capacity=self._runner.capacity, after_fault=after_fault))

    def loop(self) -> None:
        """Handles messages in order until `stop`; continues fills and loads after each message and while idle."""
        self._inbox.watch(self._stop_signal[0])
        if self._runner.adapters.descriptor is not None:
            self._inbox.watch(self._runner.adapters.descriptor)
        while not self._is_stopping:
            for message in self._inbox.receive(0.0 if self._launched else self._runner.poll_seconds):
                self.handle(message)
                self._answer()
                self._advance()
            self._answer()
            self._advance()
            if self._launched:
                time.sleep(POLL_SECONDS)

    def handle(self, message: ToRunner) -> None:
        """Handles one message. Steps are only launched: `_answer` sends their results."""
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
        """Sends StepDone for the steps that have ended, without waiting."""
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
        """Waits for the launched steps and discards their results: the scheduler that sent them is gone."""
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
        """Starts the epoch of a new scheduler: clears the rows and discards the steps of the former scheduler."""
        self._drain_launched()
        self._epoch = self._config.endpoints.epoch * SCHEDULER_EPOCHS + message.epoch
        self._runner.reset()
        self._scheduler.send(RunnerReady(epoch=self._epoch, capacity=self._runner.capacity))

    def _greet(self, hello: Hello) -> None:
        """Connects to the sender of `hello` if it is a scheduler with another inbox address, i.e. a new scheduler."""
        if hello.process == "scheduler" and hello.inbox != self._scheduler.address:
            self._scheduler.close()
            self._scheduler = self._connect(hello.inbox)
