"""Inboxes accept the messages of their union only; frames have a size limit on both sides."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from socket import socketpair

import msgspec
import pytest
import zmq
import zmq.asyncio

from engine import ipc
from engine.errors import InternalError
from engine.ipc import AsyncInbox, Inbox, Outbox
from engine.messages import Abort, Capacity, Ping, Progress, Reset, Step, ToRunner, Update


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def _drain(inbox: Inbox, count: int) -> list[object]:
    got: list[object] = []
    while len(got) < count:
        batch = list(inbox.receive(5.0))
        assert batch, f"only {len(got)} of {count} arrived"
        got += batch
    return got


def test_messages_of_an_early_peer_arrive_in_order(context: zmq.Context, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/inbox"
    outbox = Outbox(context, address)
    for number in range(100):
        outbox.send(Step(epoch=0, id=number))
    inbox: Inbox = Inbox(context, address, ToRunner)
    assert [step.id for step in _drain(inbox, 100)] == list(range(100))
    outbox.close()
    inbox.close()


def _deleted(directory: Path, mode: int = 0o700) -> None:
    """Deletes a directory with its sockets and makes it again."""
    shutil.rmtree(directory)
    directory.mkdir()
    directory.chmod(mode)


def test_a_deleted_socket_is_bound_again(context: zmq.Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that were connected stay connected, and new ones find the same path."""
    monkeypatch.setattr(ipc, "KEEP_SECONDS", 0.01)
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    address = f"ipc://{directory}/inbox"
    inbox: Inbox = Inbox(context, address, ToRunner)
    early = Outbox(context, address)
    early.send(Step(epoch=0, id=1))
    assert len(_drain(inbox, 1)) == 1
    for number in range(2, 5):
        _deleted(directory)
        late = Outbox(context, address)
        late.send(Step(epoch=0, id=number))
        early.send(Step(epoch=0, id=0))
        assert {step.id for step in _drain(inbox, 2)} == {0, number}
        late.close()
    early.close()
    inbox.close()


def test_a_deleted_socket_is_not_bound_in_public(
    context: zmq.Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc, "KEEP_SECONDS", 0.01)
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    inbox: Inbox = Inbox(context, f"ipc://{directory}/inbox", ToRunner)
    _deleted(directory, mode=0o777)
    assert list(inbox.receive(0.1)) == []
    assert not (directory / "inbox").exists()
    directory.chmod(0o700)
    assert list(inbox.receive(0.1)) == []
    assert (directory / "inbox").is_socket()
    inbox.close()


def test_a_deleted_socket_of_a_loop_is_bound_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "KEEP_SECONDS", 0.01)
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)

    async def work() -> None:
        context, address = zmq.asyncio.Context(), f"ipc://{directory}/inbox"
        inbox: AsyncInbox = AsyncInbox(context, address, ToRunner)
        message = asyncio.ensure_future(anext(inbox))
        await asyncio.sleep(0)
        _deleted(directory)
        outbox = Outbox(zmq.Context.shadow(context.underlying), address)
        outbox.send(Step(epoch=0, id=7))
        assert (await asyncio.wait_for(message, 5)).id == 7
        outbox.close()
        inbox.close()
        context.term()

    asyncio.run(work())


def test_foreign_frames_are_refused_and_logged(
    context: zmq.Context, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"ipc://{tmp_path}/inbox"
    inbox: Inbox = Inbox(context, address, ToRunner)
    raw = context.socket(zmq.PUSH)
    raw.connect(address)
    step = msgspec.to_builtins(Step(epoch=0, id=1))
    bad_chunk = [*step]
    bad_chunk[-1] = [["x"]]
    with caplog.at_level(logging.WARNING):
        for frame in (
            b"\x80\x04\x95garbage",
            msgspec.msgpack.encode(Abort(0, 1)),  # a message of another inbox
            msgspec.msgpack.encode(bad_chunk),
            b"",
            msgspec.msgpack.encode(Ping()),  # a message between clients and the ZeroMQ server only
            msgspec.msgpack.encode(Reset(1)),
        ):
            raw.send(frame)
        assert _drain(inbox, 1) == [Reset(1)]
    assert len(caplog.records) == 5
    assert "$[6][0]" in caplog.text  # the path of the bad field
    raw.close(0)
    inbox.close()


def test_oversized_frame_is_refused_by_the_sender(context: zmq.Context, tmp_path: Path) -> None:
    outbox = Outbox(context, f"ipc://{tmp_path}/inbox", max_frame=1000)
    with pytest.raises(InternalError, match="Progress"):
        outbox.send(Progress(0, [Update(request_id=1, index=0, tokens=[70000] * 1000)]))
    outbox.close()


def test_oversized_foreign_frame_ends_only_its_connection(context: zmq.Context, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/inbox"
    inbox: Inbox = Inbox(context, address, ToRunner, max_frame=1000)
    raw = context.socket(zmq.PUSH)
    raw.connect(address)
    raw.send(b"x" * 2000)
    outbox = Outbox(context, address)
    outbox.send(Reset(1))
    assert _drain(inbox, 1) == [Reset(1)]
    for end in (raw, outbox, inbox):
        end.close()


def test_receive_waits_no_longer_than_its_timeout(context: zmq.Context, tmp_path: Path) -> None:
    inbox: Inbox = Inbox(context, f"ipc://{tmp_path}/inbox", ToRunner)
    assert list(inbox.receive(0.01)) == []
    inbox.close()


def test_async_inbox_accepts_the_same_messages(context: zmq.Context, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/inbox"

    async def receive() -> list[object]:
        loop_context = zmq.asyncio.Context()
        inbox: AsyncInbox = AsyncInbox(loop_context, address, Capacity | Ping)
        outbox = Outbox(context, address)
        outbox.send(Step(epoch=0, id=1))  # refused
        outbox.send(Ping(3))
        got = await asyncio.wait_for(anext(inbox), 5)
        outbox.close()
        inbox.close()
        loop_context.destroy(linger=0)
        return [got]

    assert asyncio.run(receive()) == [Ping(3)]


def test_receive_returns_for_a_watched_descriptor(context: zmq.Context, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/inbox"
    inbox: Inbox = Inbox(context, address, ToRunner)
    ours, theirs = socketpair()
    inbox.watch(ours.fileno())
    assert list(inbox.receive(0.0)) == []
    theirs.send(b"x")
    began = time.monotonic()
    assert list(inbox.receive(30.0)) == []
    assert time.monotonic() - began < 10
    outbox = Outbox(context, address)
    outbox.send(Reset(4))
    ours.recv(1)
    assert _drain(inbox, 1) == [Reset(4)]
    for end in (ours, theirs):
        end.close()
    outbox.close()
    inbox.close()
