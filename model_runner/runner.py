"""The runner executes the scheduler's steps: fills, lanes, new rows, one forward over the chunks, and sampling.

`launch` queues a step on the device, and the copy of its results to the host, without waiting; `finish` waits for this
step only and returns its StepDone, so that steps launched later do not delay the results. A step that contradicts the
state of the rows raises InternalError: the scheduler and the runner disagree, which only a restart repairs. Does not
depend on sockets, requests or text.
"""

from __future__ import annotations

import time

import torch
from msgspec.structs import replace

from engine.config.process_configs import RunnerConfig
from engine.messages import AdapterState, Capacity, Step, StepDone
from engine.processes.busy_timer import BusyTimer
from model_runner.build.assembly import Parts, assemble
from model_runner.launched_step import LaunchedStep
from model_runner.lora.adapters import Adapters
from model_runner.lora.adapters_off import AdaptersOff
from model_runner.platform.device import DeviceEvent, device_memory
from model_runner.step_forward import StepForward

FILL_SHARE = 0.1
"""The share of a step's time that fills may take after the step."""

FILL_SHARE_WITHOUT_DECODES = 1.0
"""The same share after a step in which no row decodes: no request waits for its next token."""


class Runner:
    """One rank of the model runner: the model, its caches and pools, and the state of the scheduler's rows."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.adapters: Adapters | AdaptersOff = parts.lora or AdaptersOff()
        self._forward = StepForward(parts)
        self._step_seconds = self._ended = 0.0
        self._graph_bytes = 0
        self._has_decodes = False

    @classmethod
    def load(cls, config: RunnerConfig, *, progress: BusyTimer | None = None) -> Runner:
        """Loads model and start-up adapters and sizes caches and pools. Raises ConfigError or AdapterError.

        With `progress`, the timer is ticked after each part of the work, and progress bars are shown.
        """
        with torch.inference_mode():
            parts = assemble(config, progress=progress)
            runner = cls(parts)
            if parts.graphs is not None:
                before = device_memory(parts.device)[1]
                parts.graphs.capture(progress=progress)
                runner._graph_bytes = max(0, before - device_memory(parts.device)[1])
            return runner

    @property
    def capacity(self) -> Capacity:
        """The sizes of this runner's caches and pools, and its resolved backends."""
        return self.parts.capacity

    def memory(self) -> dict[str, int]:
        """Returns the bytes of the device's memory by use; `rest` is what the computation has allocated so far."""
        total, free = device_memory(self.parts.device)
        c = self.capacity
        known = {"weights": c.weight_bytes, "KV": c.kv_bytes, "rank pages": c.lora_bytes, "graphs": self._graph_bytes}
        return {**known, "rest": max(0, total - free - sum(known.values())), "free": free}

    @property
    def graph_sizes(self) -> list[int]:
        """The numbers of rows that decode steps are padded to; empty without CUDA graphs."""
        return [] if self.parts.graphs is None else self.parts.graphs.sizes

    def execute(self, step: Step) -> StepDone:
        """Launches the step and waits for its results. Fills without `at_once` only begin; `advance` continues them."""
        return self.finish(self.launch(step))

    def launch(self, step: Step) -> LaunchedStep:
        """Queues the step on the device, after the steps launched before."""
        began = time.perf_counter()
        self._has_decodes = any(not chunk.tokens for chunk in step.chunks)
        with torch.inference_mode():
            for fill in step.fills:
                self.adapters.fill(fill)
            for lane in step.lanes:
                self.adapters.set_lane(lane)
            for new in step.new_rows:
                self.parts.rows.begin(new)
                self.parts.sampler.begin(new)
            if not step.chunks:
                return LaunchedStep(step.epoch, step.id, began, DeviceEvent(self.parts.device))
            return self._forward.launch(step, began)

    def finish(self, launched: LaunchedStep) -> StepDone:
        """Waits for the step and returns its StepDone.

        `seconds` is the time since the step's launch, or since the end of the step before it if that was later.
        """
        launched.done.wait()
        answer = launched.answer()
        now = time.perf_counter()
        self._step_seconds, self._ended = now - max(launched.began, self._ended), now
        return replace(answer, seconds=self._step_seconds)

    def advance(self) -> list[AdapterState]:
        """Continues fills and loads and takes over kernels compiled meanwhile, without waiting.

        Fills take at most a tenth of the last step's time, or all of its time if no row decoded in it. Returns the
        states of the adapters whose fill or load has ended.
        """
        self.parts.kernels.poll()
        share = FILL_SHARE if self._has_decodes else FILL_SHARE_WITHOUT_DECODES
        with torch.inference_mode():
            return self.adapters.advance(share * self._step_seconds)

    @property
    def poll_seconds(self) -> float | None:
        """The seconds within which `advance` must be called again (None: no limit). It must be called earlier if the
        adapters' `descriptor` becomes readable.
        """
        waits = [self.parts.kernels.poll_seconds, self.adapters.poll_seconds]
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def reset(self) -> None:
        """Clears rows, lanes and fills; adapters in the host cache stay."""
        self.parts.rows.reset()
        self.parts.sampler.reset()
        self.adapters.reset()

    def close(self) -> None:
        """Ends the loader processes and the compilation of kernels."""
        self.parts.kernels.close()
        self.adapters.close()
