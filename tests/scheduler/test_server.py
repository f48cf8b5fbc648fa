"""scheduler.server: the real process with real sockets, a fake runner and a fake tokenizer process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from fixtures.scheduling.fake_runner.library import Library, oracle
from fixtures.scheduling.fake_runner.runner import FakeRunner

from engine.config.process_configs import AdapterSource, Endpoints, SchedulerConfig
from engine.ipc import Inbox, Outbox
from engine.messages import (
    AdapterState,
    Capacity,
    EvictAdapter,
    Footprint,
    Generate,
    Hello,
    LoadAdapter,
    Progress,
    RunnerReady,
    Sampling,
    Stats,
    Step,
    Stopping,
    ToRunner,
    ToTokenizer,
    UnloadAdapter,
)
from engine.processes.child import STOP

pytestmark = pytest.mark.e2e

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
CAPACITY = Capacity(
    kv_pages=16,
    page_size=4,
    rows=4,
    max_length=64,
    max_batched_tokens=8,
    vocab_size=97,
    max_loras=1,
    rank_pages={"qkv": 2},
    max_lane_pages=2,
)


class Neighbours:
    """A real scheduler process, with a fake runner and the tokenizer process's inbox, both driven by the test."""

    def __init__(self, directory: Path, window: int) -> None:
        def address(name: str) -> str:
            return f"ipc://{directory}/{name}"

        endpoints = Endpoints(
            tokenizer=address("t"), scheduler=address("s"), runner=address("r"), zmq_server=address("d")
        )
        self.context: zmq.Context[Any] = zmq.Context()
        self.tokenizer: Inbox[ToTokenizer] = Inbox(self.context, endpoints.tokenizer, ToTokenizer)
        self.runner: Inbox[ToRunner] = Inbox(self.context, endpoints.runner, ToRunner)
        self.scheduler = Outbox(self.context, endpoints.scheduler)
        self.library = Library({1: Footprint({"qkv": 2})})
        self.fake = FakeRunner(CAPACITY, self.library)
        self.received: list[Any] = []
        source = AdapterSource(adapter_id=1, name="one", path="one", root="one")
        config = SchedulerConfig(endpoints=endpoints, max_loras=1, window=window, adapters=[source])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "scheduler"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENV,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(config) + b"\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()).startswith(b'{"type":"Heartbeat"'):
            pass
        self.ready = line

    def turn(self, seconds: float = 0.05) -> None:
        """Receives the messages to both processes once, and sends the fake runner's results."""
        for message in self.runner.receive(seconds):
            if isinstance(message, Step | LoadAdapter | UnloadAdapter | EvictAdapter):
                self.fake.accept(message)
        while self.fake.queue:
            self.scheduler.send(self.fake.finish())
        while self.fake.events:
            self.scheduler.send(self.fake.deliver(0))
        self.received += self.tokenizer.receive(0)

    def until(self, kind: type[Any], count: int = 1) -> list[Any]:
        """Calls `turn` until `count` messages of a kind were received, and returns these messages."""
        end = time.monotonic() + 20
        while len(found := [message for message in self.received if isinstance(message, kind)]) < count:
            assert time.monotonic() < end, f"no {kind.__name__} among {self.received}"
            self.turn()
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.tokenizer.close()
        self.runner.close()
        self.scheduler.close()
        self.context.term()


@pytest.fixture(params=[1, 2])
def neighbours(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Neighbours]:
    neighbours = Neighbours(tmp_path, request.param)
    yield neighbours
    neighbours.close()


def _generate(request_id: int, lora: list[tuple[int, float]]) -> Generate:
    return Generate(
        epoch=0, request_id=request_id, prompt=[1, 2, 3], lora=lora, sampling=Sampling(), stopping=Stopping(20)
    )


def test_stats_list_waiting_requests(neighbours: Neighbours) -> None:
    """The runner sends no results: requests wait for its four rows, and Stats are sent though nothing else happens."""
    neighbours.scheduler.send(RunnerReady(epoch=0, capacity=CAPACITY))
    for number in range(1, 7):
        neighbours.scheduler.send(_generate(number, []))
    end = time.monotonic() + 20
    while True:
        assert time.monotonic() < end
        told = [message for message in neighbours.tokenizer.receive(0.1) if isinstance(message, Stats)]
        if told and told[-1].waiting:
            break
    waiting = told[-1].oldest_waiting
    assert [each.request_id for each in waiting] == list(range(1, 7))[-told[-1].waiting :]
    assert len({each.reason for each in waiting}) == 1


def test_stats_are_sent_while_a_request_waits_for_a_load(neighbours: Neighbours) -> None:
    """The runner never ends a load: while a request waits for it, the scheduler sends Stats each second."""
    neighbours.scheduler.send(RunnerReady(epoch=0, capacity=CAPACITY))
    neighbours.scheduler.send(LoadAdapter(adapter_id=1, path="adapters/1"))
    neighbours.scheduler.send(_generate(1, [(1, 1.0)]))
    told: list[Stats] = []
    end = time.monotonic() + 20
    while len(told) < 4:
        assert time.monotonic() < end, f"no message after {told}"
        told += [message for message in neighbours.tokenizer.receive(0.1) if isinstance(message, Stats)]
    assert all(stats.waiting_reasons == {"load": 1} for stats in told[-3:])


def test_requests_through_real_sockets(neighbours: Neighbours) -> None:
    assert neighbours.ready.startswith(b'{"type":"Ready"'), "ready as soon as the inbox is bound, without a runner"
    assert neighbours.until(Hello)[0].process == "scheduler"
    messages = [_generate(1, []), _generate(2, [(1, 1.0)])]
    neighbours.scheduler.send(LoadAdapter(adapter_id=1, path="adapters/1"))
    for message in messages:
        neighbours.scheduler.send(message)  # sent before RunnerReady: the scheduler keeps them
    neighbours.scheduler.send(RunnerReady(epoch=0, capacity=CAPACITY))
    assert neighbours.until(Capacity) == [CAPACITY]
    end = time.monotonic() + 20
    tokens: dict[int, list[int]] = {1: [], 2: []}
    finished: set[int] = set()
    while len(finished) < 2:
        assert time.monotonic() < end
        neighbours.turn()
        updates = [u for m in neighbours.received if isinstance(m, Progress) for u in m.updates]
        finished = {u.request_id for u in updates if u.finish == "length"}
    for update in updates:
        tokens[update.request_id] += update.tokens
    for message in messages:
        assert tokens[message.request_id] == oracle(message, neighbours.library, CAPACITY)[0]
    assert [state.state for state in neighbours.until(AdapterState, 2)] == ["host", "resident"]
    _becomes_idle(neighbours)
    neighbours.process.send_signal(signal.SIGTERM)  # ignored: the launcher obeys it
    assert neighbours.process.stdin is not None
    neighbours.process.stdin.write(STOP)
    neighbours.process.stdin.flush()
    assert neighbours.process.wait(10) == 0


def _becomes_idle(neighbours: Neighbours) -> None:
    """Waits until all requests have ended; asserts that the process then sends nothing and uses no CPU time."""
    end = time.monotonic() + 20
    while not (neighbours.until(Stats)[-1].running == 0 and neighbours.until(Stats)[-1].generation_tokens == 40):
        assert time.monotonic() < end
        neighbours.turn()
    assert neighbours.until(Stats)[-1].audits > 0
    before, used = len(neighbours.received), _cpu(neighbours.process.pid)
    for _ in range(4):
        neighbours.turn(0.3)
    assert len(neighbours.received) <= before + 1
    assert _cpu(neighbours.process.pid) - used <= 5, "an idle scheduler uses CPU time"


def _cpu(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_end_of_stdin_ends_the_process(neighbours: Neighbours) -> None:
    assert neighbours.process.stdin is not None
    neighbours.process.stdin.close()
    assert neighbours.process.wait(10) == 0
    neighbours.process.stdin = None


def test_bad_config_is_reported() -> None:
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "scheduler"], input=b"{}\n", capture_output=True, timeout=20, env=ENV
    )
    assert answer.returncode == 1
    assert b"Failed" in answer.stdout
    assert b"SchedulerConfig" in answer.stdout
