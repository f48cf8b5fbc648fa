"""The runner's handle of one loader child: starts it, sends jobs, receives packets, kills it.

Sending and receiving never block.
"""

from __future__ import annotations

import array
import os
import socket
import weakref
from collections.abc import Iterator

import msgspec
from msgspec.structs import replace

from engine.ipc import DECODE_ERRORS
from model_runner.lora.loading.messages import MAX_PACKET, Loaded, LoaderConfig, LoadJob, Refused, Surveyed
from model_runner.lora.loading.shm_adapter import ShmAdapter
from model_runner.platform.child_process import ChildProcess

Reply = Surveyed | Refused | Loaded
_REPLY: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
END_SECONDS = 0.2
"""The longest wait for the end of a child that is killed while others load: it may hang in the kernel for longer."""


class LoaderGone(Exception):
    """The child is dead, or was killed because its packet was invalid. The message says how it ended."""


class LoaderProcess:
    """A running loader child. It is killed when this object is garbage collected, if not before."""

    def __init__(self, config: LoaderConfig) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        try:
            with theirs:
                own_config = replace(config, socket=theirs.fileno())
                self._child = ChildProcess("model_runner.lora.loading", own_config, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        self._end = weakref.finalize(self, _end, self._child, ours, END_SECONDS)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def fileno(self) -> int:
        """Returns the descriptor that is readable when the child has sent a packet."""
        return self._socket.fileno()

    def send(self, job: LoadJob) -> bool:
        """Sends a job. Returns False if the child cannot receive it."""
        try:
            self._socket.send(msgspec.msgpack.encode(job))
        except OSError:
            return False
        return True

    def receive(self) -> Iterator[tuple[Reply, ShmAdapter | None]]:
        """Yields every received packet, with its adapter, which the caller must close. Raises LoaderGone."""
        while True:
            descriptors = array.array("i")
            try:
                packet, ancillary, _, _ = self._socket.recvmsg(
                    MAX_PACKET, socket.CMSG_LEN(descriptors.itemsize), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except ConnectionError:
                packet, ancillary = b"", []
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            if not packet:
                raise LoaderGone(self.kill())
            yield self._read(packet, list(descriptors))

    def kill(self, seconds: float | None = None) -> str:
        """Kills the child, if it is running. Waits at most `seconds` (None: END_SECONDS). Returns how it ended."""
        if self._end.detach() is not None:
            _end(self._child, self._socket, END_SECONDS if seconds is None else seconds)
        return self._child.exit_text

    def _read(self, packet: bytes, descriptors: list[int]) -> tuple[Reply, ShmAdapter | None]:
        try:
            reply = _REPLY.decode(packet)
            if len(descriptors) != isinstance(reply, Loaded):
                raise msgspec.ValidationError(f"{len(descriptors)} descriptors came with it")
        except DECODE_ERRORS as error:
            for descriptor in descriptors:
                os.close(descriptor)
            self.kill()
            raise LoaderGone(f"made no sense ({error})") from error
        return reply, ShmAdapter(descriptors[0], reply.tensor_bytes, reply.manifest_bytes) if isinstance(
            reply, Loaded
        ) else None


def _end(child: ChildProcess, link: socket.socket, seconds: float) -> None:
    child.kill(seconds)
    link.close()
