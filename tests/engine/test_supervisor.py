"""Children start by name, report once, are noticed when they die, and never outlive their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_that import Orders

from engine.errors import AdapterError, ConfigError, EngineDead, InvalidRequest
from engine.supervisor import Process, Spec, Supervisor

FIXTURES = str(Path(__file__).parent.parent / "fixtures")


def _spec(does: str) -> Spec:
    return Spec(does, "child_that", Orders(does), environment={"PYTHONPATH": FIXTURES})


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while _alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def test_ready_passes_stray_prints_and_stop_ends_it() -> None:
    async def run() -> int:
        process = await Process.start(_spec("serves"))
        report = await process.report()
        assert report.facts == {"pid": process.pid}
        await process.stop(10)
        assert "signal 15" in await process.exit()
        return process.pid

    assert not _alive(asyncio.run(run()))


@pytest.mark.parametrize(
    ("does", "error", "words"),
    [
        ("fails", InvalidRequest, "adapter 'x': cut file"),
        ("dies", EngineDead, "exited with code 7"),
        ("is killed", EngineDead, "killed by signal 9"),
    ],
)
def test_a_child_that_cannot_serve_says_why(does: str, error: type[Exception], words: str) -> None:
    async def run() -> None:
        async with Supervisor([_spec("serves"), _spec(does)]) as supervisor:
            await supervisor.ready()

    with pytest.raises(error, match=words):
        asyncio.run(run())


def test_the_reason_is_preferred_to_its_consequence() -> None:
    async def run() -> None:
        async with Supervisor([_spec("dies"), _spec("fails"), _spec("serves")]) as supervisor:
            await asyncio.sleep(0.5)
            await supervisor.ready()

    with pytest.raises(InvalidRequest, match="cut file"):
        asyncio.run(run())


def test_the_first_death_is_told_and_the_others_are_ended() -> None:
    async def run() -> tuple[str, list[int]]:
        async with Supervisor([_spec("serves"), _spec("serves, then dies")]) as supervisor:
            reports = await supervisor.ready()
            return await supervisor.first_death(), [int(str(report.facts["pid"])) for report in reports.values()]

    death, pids = asyncio.run(run())
    assert death == "the serves, then dies process exited with code 9"
    assert not any(map(_alive, pids))


def test_one_that_ignores_sigterm_is_killed() -> None:
    async def run() -> int:
        async with Supervisor([_spec("ignores SIGTERM")], grace=0.3) as supervisor:
            return int(str((await supervisor.ready())["ignores SIGTERM"].facts["pid"]))

    assert not _alive(asyncio.run(run()))


def test_children_end_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio, sys, time\n"
            "from engine.supervisor import Process, Spec\n"
            "from child_that import Orders\n"
            "async def main():\n"
            "    child = await Process.start(Spec('c', 'child_that', Orders('ignores SIGTERM')))\n"
            "    await child.report(); print(child.pid, flush=True); await asyncio.sleep(60)\n"
            "asyncio.run(main())",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": FIXTURES},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _wait_gone(pid)


def test_a_hostile_package_in_the_working_directory_does_not_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("engine", "msgspec", "child_that"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('hostile')")
    monkeypatch.chdir(tmp_path)

    async def run() -> None:
        async with Supervisor([_spec("serves")]) as supervisor:
            await supervisor.ready()

    asyncio.run(run())


def test_error_kinds_survive_the_report() -> None:
    assert issubclass(AdapterError, InvalidRequest)
    assert ConfigError.kind != InvalidRequest.kind
