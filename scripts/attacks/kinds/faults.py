"""Faults beside the attacks: processes killed and stopped, full disks, closed descriptors, a deleted run directory.

Only with `--faults`. Streams may then pause, and those of a killed tokenizer process end; no token changes.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from attacks.kind import Broken, Skipped, kind
from attacks.kinds.adapter_calls import change, models
from attacks.processes import PROCESSES, children, runs
from attacks.target import Target

BACK_SECONDS = 90.0
STRIKES = asyncio.Lock()
"""Held while a process is down: the manual promises that any process may die, and ends a launch after many deaths."""


async def serves_again(target: Target, name: str, before: int) -> None:
    """Waits until another process runs `name` and a request is answered. Raises Broken after BACK_SECONDS."""
    deadline = time.monotonic() + BACK_SECONDS
    while time.monotonic() < deadline:
        await asyncio.sleep(0.2)
        if not runs(target.config.pid):
            raise Broken(f"the launch ended after a fault of {name}")
        if children(target.config.pid).get(name, before) == before:
            continue
        body = {"input_ids": [9], "sampling_params": {"max_new_tokens": 2}}
        if (await target.call("/generate", body, expect=(200, 500, 503), seconds=BACK_SECONDS)).status == 200:
            return
    raise Broken(f"{name} is not back {BACK_SECONDS:.0f} s after a fault")


@kind("faults.strikes", seconds=240)
async def strikes(target: Target, draw: random.Random) -> None:
    """SIGKILL, SIGSTOP, SIGABRT or SIGSEGV of one of the three processes; it comes back."""
    async with STRIKES:
        name = draw.choice(PROCESSES)
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGABRT, signal.SIGSEGV])
        before = children(target.config.pid).get(name)
        if before is not None:
            os.kill(before, number)
            target.statuses[f"{number.name} {name}"] += 1
            await serves_again(target, name, before)
        await asyncio.sleep(draw.uniform(1, 4))


@kind("faults.pairs", seconds=240)
async def pairs(target: Target, draw: random.Random) -> None:
    """SIGKILL of two processes at once."""
    async with STRIKES:
        found = children(target.config.pid)
        names = draw.sample(PROCESSES, 2)
        if set(names) <= set(found):
            for name in names:
                os.kill(found[name], signal.SIGKILL)
            for name in names:
                await serves_again(target, name, found[name])
        await asyncio.sleep(draw.uniform(1, 4))


@kind("faults.full_disk", seconds=300)
async def full_disk(target: Target, draw: random.Random) -> None:
    """A full disk under the run directory: a change is made or refused; a successor serves what was acknowledged."""
    if not await asyncio.to_thread(os.path.ismount, target.run_directory.parent):
        raise Skipped("the run directory is on no small file system of its own: mounting one needs root")
    async with STRIKES:
        paths = {voice: str(target.demo / "adapters" / voice) for voice in ("pirate", "json", "poet", "french")}
        name, meaning = "disk", None
        ballast = target.run_directory.parent / "ballast"
        await asyncio.to_thread(fill, ballast)
        try:
            for number in range(8):
                voice = draw.choice([*paths, None])
                if voice is None:
                    answer = await change(target, "/unload_lora_adapter", name)
                else:
                    answer = await change(target, "/v1/load_lora_adapter", name, path=paths[voice], load_inplace=True)
                if answer.status == 200:
                    meaning = voice
                if number == 4 and draw.random() < 0.5:
                    ballast.unlink()
        finally:
            ballast.unlink(missing_ok=True)
        before = children(target.config.pid)["tokenizer_proc"]
        os.kill(before, signal.SIGKILL)
        await serves_again(target, "tokenizer_proc", before)
        found = next((card["root"] for card in await models(target) if card["id"] == name), None)
        if found != (paths[meaning] if meaning else None):
            raise Broken(f"acknowledged was {meaning}, and the next tokenizer process serves {found}")
        await change(target, "/unload_lora_adapter", name)


def fill(ballast: Path) -> None:
    """Writes to a file until its file system is full."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            return


# ------------------------------------------------------------------------------------------- launches of their own


def launch(closed: str, directory: Path) -> tuple[subprocess.Popen[bytes], int, list[int]]:
    """Starts a server of its own whose standard descriptors are closed, full or unread.

    Returns it, its port, and descriptors of ours that must stay open meanwhile.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "engine.launch", "--port", str(port), "--dtype", "float32", "--cpu-threads", "1"]
    kept: list[int] = []
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    redirect = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}.get(closed, "")
    if closed == "full":
        streams["stdout"] = streams["stderr"] = os.open("/dev/full", os.O_WRONLY)
        kept.append(streams["stdout"])
    if closed in ("unread", "gone"):
        read, write = os.pipe()
        streams["stderr"] = write
        kept += [read, write]
    command = ["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", *command]
    environment = {**os.environ, "TMPDIR": str(directory), "OMP_NUM_THREADS": "1"}
    hang_up = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # under nohup it would ignore the signal
    server = subprocess.Popen(command, env=environment, cwd=directory, preexec_fn=hang_up, **streams)
    return server, port, kept


async def generates(target: Target, port: int, seconds: float) -> bool:
    """Returns whether the server on this port answers a request within the time."""
    deadline = time.monotonic() + seconds
    body = {"input_ids": [9], "sampling_params": {"max_new_tokens": 2}}
    while time.monotonic() < deadline:
        try:
            async with (
                asyncio.timeout(30),
                target.session.post(f"http://127.0.0.1:{port}/generate", json=body) as answer,
            ):
                if answer.status == 200:
                    return True
        except (OSError, TimeoutError):
            pass
        await asyncio.sleep(0.3)
    return False


@kind("faults.descriptors", seconds=400)
async def descriptors(target: Target, draw: random.Random) -> None:
    """A launch with stdin, stdout or stderr closed, full, unread or left: it serves, and a killed runner comes back."""
    closed = draw.choice(["stdin", "stdout", "stderr", "all", "full", "unread", "gone"])
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        server, port, kept = launch(closed, Path(directory))
        try:
            if not await generates(target, port, 180):
                raise Broken(f"with {closed}: it does not serve (exit status {server.poll()})")
            if closed == "gone":
                os.close(kept.pop(0))
            for _ in range(400):  # each call is a line of the log
                async with target.session.get(f"http://127.0.0.1:{port}/version") as answer:
                    await answer.read()
            os.kill(children(server.pid)["model_runner"], signal.SIGKILL)
            if not await generates(target, port, BACK_SECONDS):
                raise Broken(f"with {closed}: a killed runner does not come back (exit status {server.poll()})")
            target.statuses[f"{closed} ok"] += 1
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(server.wait, 60)
            except subprocess.TimeoutExpired:
                server.kill()
                await asyncio.to_thread(server.wait)
            for descriptor in kept:
                os.close(descriptor)


@kind("faults.launcher", seconds=400)
async def launcher(target: Target, draw: random.Random) -> None:
    """SIGKILL or SIGHUP of a launcher: its children end, and the next start removes its directory."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        number = draw.choice([signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
        server, port, _ = launch("none", Path(directory))
        early = draw.random() < 0.3
        if early:
            await asyncio.sleep(draw.uniform(0.1, 3))
        elif not await generates(target, port, 180):
            raise Broken(f"a second server does not serve (exit status {server.poll()})")
        pids = list(children(server.pid).values())
        server.send_signal(number)
        await asyncio.to_thread(server.wait)
        deadline = time.monotonic() + 30
        while any(map(runs, pids)):
            if time.monotonic() > deadline:
                raise Broken(f"{number.name} of the launcher: children run on after 30 s")
            await asyncio.sleep(0.1)
        server, port, _ = launch("none", Path(directory))
        try:
            if not await generates(target, port, 180):
                raise Broken(f"after {number.name} of a launcher the next one does not serve")
            left = [name for name in await asyncio.to_thread(os.listdir, directory) if name.startswith("chorus-")]
            if len(left) > 1:
                raise Broken(f"{number.name} of the launcher{' early' * early} left {left}")
        finally:
            server.send_signal(signal.SIGTERM)
            await asyncio.to_thread(server.wait)
