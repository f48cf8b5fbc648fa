"""The runner as a real process: config on stdin, messages over ipc, and every way it can end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import MagicMock

import msgspec
import pytest
import zmq
from fixtures.models.tiny_models import make_adapter
from fixtures.processes.resources import children, descriptors, shared_bytes

from engine import logs
from engine.config.process_configs import AdapterSource, Endpoints, RunnerConfig
from engine.ipc import Inbox, Outbox
from engine.messages import (
    AdapterState,
    Chunk,
    EvictAdapter,
    Fill,
    Hello,
    LanePages,
    LoadAdapter,
    NewRow,
    Reset,
    RunnerReady,
    Sampling,
    Step,
    StepDone,
    ToScheduler,
    UnloadAdapter,
)
from engine.processes.child import STOP, Failed, Heartbeat, Ready
from model_runner import server
from model_runner.server import SCHEDULER_EPOCHS

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
GREEDY = Sampling(temperature=0.0)
M = TypeVar("M")


class Child:
    """A runner process, and the two sockets of a scheduler."""

    def __init__(self, config: RunnerConfig) -> None:
        self.config = config
        self._context: zmq.Context[Any] = zmq.Context()
        self.inbox: Inbox[Any] = Inbox(self._context, config.endpoints.scheduler, ToScheduler)
        self.outbox = Outbox(self._context, config.endpoints.runner)
        self._waiting: list[Any] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", "-m", "model_runner"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(config) + b"\n")
        self.process.stdin.flush()

    def report(self) -> Ready | Failed:
        """Returns the child's report on stdout, after its signs of life."""
        assert self.process.stdout is not None
        signs = 0
        while isinstance(
            word := msgspec.json.decode(self.process.stdout.readline(), type=Ready | Failed | Heartbeat), Heartbeat
        ):
            signs += 1
        assert signs, "it gave no sign of life in its start"
        return word

    def next(self, type_: type[M]) -> M:
        """Receives the next message, which must be of this type."""
        if not self._waiting:
            self._waiting += self.inbox.receive(30.0)
        message = self._waiting.pop(0)
        assert isinstance(message, type_), message
        return message

    def stop(self) -> None:
        """Sends a SIGTERM, which is ignored, and asks the child to stop, as the launcher does."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdin is not None
        self.process.stdin.write(STOP)
        self.process.stdin.flush()

    def close(self) -> None:
        """Kills the child."""
        self.process.kill()
        self.process.communicate()
        self.inbox.close()
        self.outbox.close()
        self._context.destroy(linger=0)


EPOCH = 3 * SCHEDULER_EPOCHS  # the first epoch of the third incarnation, before any reset


@pytest.fixture
def start(tiny_model: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """`start(**config)`: a child on the tiny model, killed when the test ends."""
    children: list[Child] = []

    def begin(**options: Any) -> Child:
        endpoints = Endpoints(
            tokenizer="", scheduler=f"ipc://{tmp_path}/s.0", runner=f"ipc://{tmp_path}/r.0", zmq_server="", epoch=3
        )
        fields = {"endpoints": endpoints, "model_path": str(tiny_model("llama3")), "max_running_requests": 4, **options}
        children.append(Child(RunnerConfig(**fields)))
        return children[-1]

    yield begin
    for child in children:
        child.close()


def step(id: int, epoch: int = EPOCH, **parts: Any) -> Step:
    return Step(epoch=epoch, id=id, **parts)


def first_chunk(lane: int = 0) -> dict[str, Any]:
    return {
        "new_rows": [NewRow(row=1, generation=1, prompt_length=3, sampling=GREEDY)],
        "chunks": [Chunk(row=1, generation=1, start=0, length=3, tokens=[5, 6, 7], pages=[2], lane=lane)],
    }


def test_runner_serves_until_stdin_ends(
    start: Callable[..., Child], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from fixtures.models.oracle import Oracle

    root = str(make_adapter(tiny_model("llama3"), tmp_path / "a", r=8))
    oracle = Oracle(tiny_model("llama3"), {"a": root})
    source = AdapterSource(adapter_id=1, name="a", path=root, root=root)
    child = start(adapters=[source], enable_lora=True, max_loras=2)
    child.outbox.send(Reset(0))  # sent while the child is loading: not lost
    report = child.report()
    assert isinstance(report, Ready)
    assert (report.facts["device"], report.facts["family"], report.facts["max_lora_rank"]) == ("cpu", "llama", 8)
    assert child.next(Hello) == Hello("runner", 3, child.config.endpoints.runner)
    ready = child.next(RunnerReady)
    assert (ready.epoch, ready.capacity.rows, ready.capacity.max_loras) == (EPOCH, 4, 2)
    assert child.next(RunnerReady) == ready

    child.outbox.send(LoadAdapter(adapter_id=1, path=root))
    loaded = child.next(AdapterState)
    assert (loaded.state, loaded.lora_rank, loaded.epoch) == ("host", 8, EPOCH)
    child.outbox.send(LoadAdapter(adapter_id=2, path=str(tmp_path / "none")))
    assert child.next(AdapterState).state == "failed"

    pages = {group: list(range(count)) for group, count in loaded.footprint.pages.items()}
    lane = LanePages(1, {group: [(page, 1.0) for page in numbers] for group, numbers in pages.items()})
    child.outbox.send(step(1, fills=[Fill(1, pages)]))
    assert child.next(StepDone).tokens == []
    assert child.next(AdapterState).state == "resident"
    child.outbox.send(step(2, lanes=[lane], **first_chunk(lane=1)))
    child.outbox.send(step(3, chunks=[Chunk(row=1, generation=1, start=3, length=1, lane=1)]))
    tokens = [*child.next(StepDone).tokens, *child.next(StepDone).tokens]
    assert tokens == oracle.greedy([5, 6, 7], 2, "a")

    child.outbox.send(
        Step(epoch=EPOCH - 1, id=9, chunks=[Chunk(row=3, generation=9, start=0, length=1)])
    )  # an older epoch
    child.outbox.send(RunnerReady(epoch=0, capacity=ready.capacity))  # a message that runners do not accept
    child.outbox.send(Reset(1))
    # a late message of a dead scheduler
    child.outbox.send(step(2, chunks=[Chunk(row=1, generation=1, start=4, length=1)]))
    assert child.next(RunnerReady) == msgspec.structs.replace(ready, epoch=EPOCH + 1)
    child.outbox.send(step(1, EPOCH + 1, **first_chunk()))
    assert child.next(StepDone).tokens == oracle.greedy([5, 6, 7], 1)
    child.outbox.send(UnloadAdapter(1))
    gone = child.next(AdapterState)
    assert (gone.state, gone.epoch) == ("gone", EPOCH + 1)

    elsewhere: Inbox[Any] = Inbox(child._context, f"ipc://{tmp_path}/s.1", ToScheduler)
    child.outbox.send(Hello("scheduler", 1, f"ipc://{tmp_path}/s.1"))
    child.outbox.send(Reset(1))
    assert list(elsewhere.receive(30.0)) == [msgspec.structs.replace(ready, epoch=EPOCH + 1)]
    elsewhere.close()

    assert child.process.stdin is not None
    child.process.stdin.close()
    child.process.stdin = None
    assert child.process.wait(timeout=30) == 0


def test_steps_go_on_during_a_slow_load(
    start: Callable[..., Child], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    root = str(make_adapter(tiny_model("llama3"), tmp_path / "a", r=8))
    child = start(enable_lora=True, max_loras=2)
    assert isinstance(child.report(), Ready)
    child.next(Hello)
    child.next(RunnerReady)
    (loader,) = children(child.process.pid)
    os.kill(loader, signal.SIGSTOP)
    child.outbox.send(LoadAdapter(adapter_id=1, path=root, name="voice"))
    child.outbox.send(step(1, **first_chunk()))
    assert child.next(StepDone).id == 1
    for number in range(2, 14):  # all positions are in one page
        child.outbox.send(step(number, chunks=[Chunk(row=1, generation=1, start=number + 1, length=1)]))
        assert child.next(StepDone).id == number
    child.outbox.send(LoadAdapter(adapter_id=2, path=root))  # a loader process reads it
    loaded = child.next(AdapterState)
    assert (loaded.adapter_id, loaded.state) == (2, "host")
    os.kill(loader, signal.SIGKILL)
    failed = child.next(AdapterState)
    assert (failed.adapter_id, failed.state) == (1, "failed")
    assert failed.error == "adapter 'voice': the loader process was killed by signal 9"
    child.outbox.send(LoadAdapter(adapter_id=1, path=root, name="voice"))
    again = child.next(AdapterState)
    assert (again.adapter_id, again.state, again.revision) == (1, "host", loaded.revision)
    child.stop()
    assert child.process.wait(timeout=30) == 0


def test_evicted_adapter_reloads_only_unchanged(
    start: Callable[..., Child], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    root = make_adapter(tiny_model("llama3"), tmp_path / "a", r=8)
    child = start(enable_lora=True, max_loras=2)
    assert isinstance(child.report(), Ready)
    child.next(Hello)
    assert child.next(RunnerReady).capacity.host_bytes > 0
    load = LoadAdapter(adapter_id=1, path=str(root))
    child.outbox.send(load)
    first = child.next(AdapterState)
    assert (first.state, first.bytes > 0, first.seconds > 0) == ("host", True, True)
    held = shared_bytes(child.process.pid)
    opened = descriptors(child.process.pid)
    for _ in range(3):
        child.outbox.send(EvictAdapter(1))
        assert child.next(AdapterState).state == "disk"
        child.outbox.send(msgspec.structs.replace(load, revision=first.revision))
        assert child.next(AdapterState).state == "host"
    assert shared_bytes(child.process.pid) <= held
    assert descriptors(child.process.pid) == opened
    child.outbox.send(EvictAdapter(1))
    assert child.next(AdapterState).state == "disk"
    config = root / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 17'))
    for says in ("its files have changed", "no such directory"):
        child.outbox.send(msgspec.structs.replace(load, revision=first.revision))
        failed = child.next(AdapterState)
        assert (failed.state, says in (failed.error or "")) == ("failed", True)
        shutil.rmtree(root, ignore_errors=True)


def test_stop_ends_with_zero_and_sigterm_is_ignored(start: Callable[..., Child]) -> None:
    child = start()
    assert isinstance(child.report(), Ready)
    child.stop()
    assert child.process.wait(timeout=30) == 0


def test_impossible_step_ends_the_process(start: Callable[..., Child]) -> None:
    child = start()
    assert isinstance(child.report(), Ready)
    child.outbox.send(step(7, chunks=[Chunk(row=0, generation=5, start=0, length=1)]))
    assert child.process.wait(timeout=30) == 1
    assert child.process.stderr is not None
    errors = child.process.stderr.read()
    assert b"step 7 of 1 chunks failed" in errors
    assert b"row 0 generation 5" in errors


def test_fatal_error_is_logged_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that writes the log is waited for: os._exit alone would end it."""
    ended: list[str] = []
    monkeypatch.setattr(logs, "flush", lambda: ended.append("flush"))
    monkeypatch.setattr(os, "_exit", lambda status: ended.append(f"exit {status}"))
    for name in ("Inbox", "CompilationCounter", "_load_runner", "facts"):
        monkeypatch.setattr(server, name, MagicMock())
    monkeypatch.setattr(zmq, "Context", MagicMock())
    monkeypatch.setattr(server, "Server", MagicMock(**{"return_value.loop.side_effect": ValueError("step 7 failed")}))
    server.serve(MagicMock(), MagicMock(), MagicMock())
    assert ended == ["flush", "exit 1"]


def test_launch_failure_is_reported_in_one_line(start: Callable[..., Child]) -> None:
    child = start(context_length=10**6)
    report = child.report()
    assert isinstance(report, Failed)
    assert (report.kind, "--context-length 1000000" in report.message) == ("config_error", True)
    assert child.process.wait(timeout=30) == 1
    assert child.process.stderr is not None
    assert b"Traceback" not in child.process.stderr.read()
