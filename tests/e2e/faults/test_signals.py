"""Stop signals reach any process at any time: streams still end, and no process or directory is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from fixtures.models.tiny_models import VOCAB, make_adapter
from fixtures.processes.watched import wait_for
from fixtures.serving.generate_streams import make_requests, read_all_tokens
from fixtures.serving.running import RunningServer

pytestmark = pytest.mark.e2e

STREAMS, TOKENS = 8, 200


def session(leader: int) -> list[int]:
    """Returns the living processes of the session, with those that have moved to a process group of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def _ended(leader: int) -> bool:
    return not session(leader)


def test_signals_to_all_processes_let_streams_finish(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """As systemd does: to every process, with the loader and the template renderer; here in any order and twice."""
    model = tiny_model("llama3")
    adapter = make_adapter(model, tmp_path / "a", r=4)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    everything = make_requests(STREAMS, [None, "a"], TOKENS, VOCAB)
    with RunningServer("--model-path", model, "--lora-paths", f"a={adapter}") as server:
        undisturbed = asyncio.run(read_all_tokens(server.url, everything, at_once=STREAMS))
        server.wait_idle()

        async def run() -> list[list[int]]:
            streams = asyncio.ensure_future(read_all_tokens(server.url, everything, at_once=STREAMS))
            await asyncio.to_thread(server.wait_stats, lambda stats: stats["running"] == STREAMS)
            processes = session(server.process.pid)
            assert len(processes) >= 6, "launcher, three processes, a loader and the renderer of templates"
            random.Random(3).shuffle(processes)
            children = [pid for pid in processes if pid != server.process.pid]
            for pid in [*children, *processes]:
                os.kill(pid, signal.SIGTERM)
            assert not streams.done(), "they end before the signals"
            return await streams

        assert asyncio.run(run()) == undisturbed
        assert server.process.wait(timeout=60) == 0, server.log()
        assert "Traceback" not in server.log()
        wait_for(partial(_ended, server.process.pid))


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="c-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_early_signals_leave_nothing_behind(
    number: signal.Signals, tiny_model: Callable[[str], Path], short_directory: Path
) -> None:
    """The signal comes ever later in the start: to the interpreter, with the directory, and with each process."""
    command = [sys.executable, "-m", "engine.launch", tiny_model("llama3"), "--port", "0", "--cpu-kernels", "off"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(short_directory)}

    def started(leader: int, processes: int, directories: int) -> bool:
        return len(session(leader)) >= processes and len(list(short_directory.iterdir())) >= directories

    for processes, directories in ((1, 0), (1, 1), (2, 1), (4, 1)):
        launch = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        wait_for(partial(started, launch.pid, processes, directories))
        launch.send_signal(number)
        assert launch.wait(timeout=60) in (0, -number)
        wait_for(partial(_ended, launch.pid))
        assert len(list(short_directory.iterdir())) <= (number == signal.SIGKILL), "a killed one's is swept by the next"
