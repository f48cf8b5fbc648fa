"""tokenizer_proc as a real process; the test plays its launcher and its scheduler."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from fixtures.models import small_tokenizers
from fixtures.serving.tokenizer_front import capacity

from engine.config.process_configs import AdapterSource, Endpoints, TokenizerConfig
from engine.ipc import Inbox, Outbox
from engine.messages import AdapterState, Generate, Hello, LoadAdapter, Progress, ToScheduler, Update
from engine.processes.child import STOP

pytestmark = pytest.mark.e2e


class Process:
    """tokenizer_proc as a child process, and the scheduler's end of its sockets."""

    def __init__(self, directory: Path, with_adapter: bool = False, tokenizer: bool = True) -> None:
        model = directory / "model"
        model.mkdir()
        if tokenizer:
            small_tokenizers.save(small_tokenizers.byte_level(), model)
        endpoints = Endpoints(
            **{name: f"ipc://{directory}/{name}" for name in ("tokenizer", "scheduler", "runner", "zmq_server")}
        )
        self.context = zmq.Context()
        self.inbox: Inbox[Any] = Inbox(self.context, endpoints.scheduler, ToScheduler)
        self.outbox = Outbox(self.context, endpoints.tokenizer)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        adapters = [AdapterSource(adapter_id=1, name="sql", path="sql", root="/sql")] if with_adapter else []
        config = TokenizerConfig(
            endpoints=endpoints,
            model_path=str(model),
            tokenizer_path=str(model),
            served_model_names=["base"],
            adapters=adapters,
            enable_lora=with_adapter,
            max_loras=1,
            listen_fd=self._listener.fileno(),
        )
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "tokenizer_proc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._listener.fileno()],
        )
        assert self.popen.stdin is not None
        self.popen.stdin.write(msgspec.json.encode(config) + b"\n")
        self.popen.stdin.flush()

    def report(self) -> dict[str, Any]:
        """Returns the child's report, after its signs of life."""
        assert self.popen.stdout is not None
        signs = 0
        while (word := json.loads(self.popen.stdout.readline()))["type"] == "Heartbeat":
            signs += 1
        assert signs, "it gave no sign of life during its start"
        return word

    def receive(self, type_: type[Any]) -> Any:
        """Returns the next message from the child, which must be of this type."""
        message = next(iter(self.inbox.receive(20)))
        assert isinstance(message, type_), message
        return message

    def post(self, path: str, body: dict[str, object]) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            return bytes(response.read())

    def stop(self) -> None:
        """Asks the process to stop, as the launcher does."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(STOP)
        self.popen.stdin.flush()

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(10)
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._listener.close()
        self.outbox.close()
        self.inbox.close()
        self.context.term()


@contextlib.contextmanager
def process(directory: Path, **options: bool) -> Iterator[Process]:
    child = Process(directory, **options)
    try:
        yield child
    finally:
        child.close()


def test_from_hello_to_an_orderly_end(tmp_path: Path) -> None:
    with process(tmp_path, with_adapter=True) as child:
        assert child.receive(Hello).process == "tokenizer"
        child.outbox.send(capacity(small_tokenizers.byte_level().get_vocab_size()))
        assert child.receive(LoadAdapter).path == "/sql"
        child.outbox.send(AdapterState(adapter_id=1, state="host", lora_rank=8))
        report = child.report()
        assert (report["type"], report["facts"]["adapters"]) == ("Ready", ["sql"])

        answers: list[bytes] = []
        body = {"model": "sql", "prompt": "hello", "max_tokens": 8}
        caller = threading.Thread(target=lambda: answers.append(child.post("/v1/completions", body)))
        caller.start()
        generate: Generate = child.receive(Generate)
        assert generate.lora == [(1, 1.0)]

        child.popen.send_signal(signal.SIGTERM)  # ignored: the launcher obeys it
        child.stop()  # the open request is still completed
        tokens = small_tokenizers.byte_level().encode(" world", add_special_tokens=False).ids
        update = Update(request_id=generate.request_id, index=0, tokens=tokens, finish="length")
        child.outbox.send(Progress(0, [update]))
        caller.join(20)
        assert json.loads(answers[0])["choices"][0]["text"] == " world"
        assert child.popen.wait(20) == 0


def test_a_failed_adapter_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    with process(tmp_path, with_adapter=True) as child:
        child.receive(Hello)
        child.outbox.send(capacity(300))
        child.receive(LoadAdapter)
        child.outbox.send(AdapterState(adapter_id=1, state="failed", error="tensor x is unused"))
        report = child.report()
        assert report["type"] == "Failed"
        assert "`sql`: tensor x is unused" in report["message"]
        assert child.popen.wait(20) == 1


def test_a_model_without_tokenizer_json_ends_the_start(tmp_path: Path) -> None:
    with process(tmp_path, tokenizer=False) as child:
        report = child.report()
        assert (report["type"], report["kind"]) == ("Failed", "config_error")
        assert "no tokenizer.json" in report["message"]
        assert child.popen.wait(20) == 1


@pytest.mark.parametrize("how", ["stop", "lifeline"])
def test_stop_ends_it_while_it_waits_for_capacity(tmp_path: Path, how: str) -> None:
    with process(tmp_path) as child:
        child.receive(Hello)
        if how == "stop":
            child.stop()
        else:
            assert child.popen.stdin is not None
            child.popen.stdin.close()
        assert child.popen.wait(20) == 0
