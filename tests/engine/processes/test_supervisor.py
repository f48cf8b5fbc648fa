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
from fixtures.processes.child_that import Orders

from engine.errors import AdapterError, ConfigError, EngineDead, InvalidRequest
from engine.processes import process
from engine.processes import supervisor as supervision
from engine.processes.process import Process, ProcessSpec
from engine.processes.supervisor import SpecFactory, Supervisor

FIXTURES = str(Path(__file__).parents[2] / "fixtures" / "processes")


def _spec(does: str) -> ProcessSpec:
    return ProcessSpec(does, "child_that", Orders(does), environment={"PYTHONPATH": FIXTURES})


def _maker(*lives: str) -> SpecFactory:
    """What each incarnation does; the last word goes for all that follow."""
    return lambda incarnation, _: _spec(lives[min(incarnation, len(lives) - 1)])


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
        assert "signal 15" in await process.wait_exit()
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
        async with Supervisor([_maker("serves"), _maker(does)]) as supervisor:
            await supervisor.ready()

    with pytest.raises(error, match=words):
        asyncio.run(run())


def test_the_reason_is_preferred_to_its_consequence() -> None:
    async def run() -> None:
        async with Supervisor([_maker("dies"), _maker("fails"), _maker("serves")]) as supervisor:
            await asyncio.sleep(0.5)
            await supervisor.ready()

    with pytest.raises(InvalidRequest, match="cut file"):
        asyncio.run(run())


def test_too_many_deaths_in_a_row_are_told_and_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "MAX_DEATHS", 2)

    async def run() -> tuple[str, list[int]]:
        async with Supervisor([_maker("serves"), _maker("serves, then dies")]) as supervisor:
            reports = await supervisor.ready()
            return await supervisor.run_until_unrecoverable(), [
                int(str(report.facts["pid"])) for report in reports.values()
            ]

    death, pids = asyncio.run(run())
    assert death == "the serves, then dies process exited with code 9, and that too often in a row"
    assert not any(map(_alive, pids))


def test_three_failed_starts_in_a_row_are_too_many() -> None:
    async def run() -> str:
        async with Supervisor([_maker("serves, then dies", "fails")]) as supervisor:
            await supervisor.ready()
            return await supervisor.run_until_unrecoverable()

    reason = asyncio.run(run())
    assert reason.startswith("the fails process ")
    assert reason.endswith("too often in a row")


def test_a_fault_is_told_from_what_others_did() -> None:
    told: list[bool] = []

    def make(incarnation: int, after_fault: bool) -> ProcessSpec:
        told.append(after_fault)
        return _spec("serves, then dies" if incarnation == 0 else "serves")

    async def run() -> None:
        async with Supervisor([make]) as supervisor:
            await supervisor.ready()
            second = await _replaced(supervisor, supervisor.pids()[0])
            os.kill(second, signal.SIGKILL)
            await _replaced(supervisor, second)

    asyncio.run(run())
    assert told == [False, True, False]


def test_a_start_that_fails_does_not_hide_the_fault_before_it() -> None:
    told: list[bool] = []
    lives = _maker("serves", "fails", "serves")

    def make(incarnation: int, after_fault: bool) -> ProcessSpec:
        told.append(after_fault)
        return lives(incarnation, after_fault)

    async def run() -> None:
        async with Supervisor([make]) as supervisor:
            await supervisor.ready()
            keeper = asyncio.ensure_future(supervisor.run_until_unrecoverable())
            os.kill(supervisor.pids()[0], signal.SIGKILL)
            async with asyncio.timeout(20):
                while len(told) < 3:
                    await asyncio.sleep(0.05)
            keeper.cancel()
            await asyncio.wait([keeper])  # a start that is cut off with its loop does not end

    asyncio.run(run())
    assert told == [False, False, False], "the failed start is nobody's fault who was in flight"


async def _replaced(supervisor: Supervisor, first: int) -> int:
    """The process id of the incarnation after `first`."""
    keeper = asyncio.ensure_future(supervisor.run_until_unrecoverable())
    try:
        async with asyncio.timeout(20):
            while (now := supervisor.pids()[0]) == first:
                assert not keeper.done()
                await asyncio.sleep(0.05)
        return now
    finally:
        keeper.cancel()
        await asyncio.wait([keeper])  # a start that is cut off with its loop does not end


@pytest.mark.parametrize("life", ["serves, then dies", "serves, then is stuck", "serves, then falls dumb"])
def test_one_that_dies_or_gets_stuck_is_replaced(life: str) -> None:
    async def run() -> tuple[int, int]:
        async with Supervisor([_maker(life, "serves")], max_busy=1.0) as supervisor:
            first = int(str((await supervisor.ready())[life].facts["pid"]))
            return first, await _replaced(supervisor, first)

    first, second = asyncio.run(run())
    assert first != second
    assert not _alive(first)


def test_one_that_is_stopped_gives_no_sign_of_life_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SILENT_SECONDS", 2)

    async def run() -> tuple[int, int]:
        async with Supervisor([_maker("serves")]) as supervisor:
            first = int(str((await supervisor.ready())["serves"].facts["pid"]))
            os.kill(first, signal.SIGSTOP)
            return first, await _replaced(supervisor, first)

    first, second = asyncio.run(run())
    assert first != second
    assert not _alive(first)


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("hangs in its start", "was stuck for [1-9][0-9]* seconds and was killed before it was ready"),
        ("is stopped in its start", "gave no sign of life for 2 seconds and was killed before it was ready"),
        ("falls dumb in its start", "was killed by signal 9 while starting"),
    ],
)
def test_a_first_start_that_hangs_is_ended(does: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _hurry(monkeypatch)

    async def run() -> list[int]:
        async with asyncio.timeout(30), Supervisor([_maker("serves"), _maker(does)], grace=0.3) as supervisor:
            pids = supervisor.pids()
            with pytest.raises(EngineDead, match=f"the {does} process {words}"):
                await supervisor.ready()
            return pids

    assert not any(map(_alive, asyncio.run(run())))


@pytest.mark.parametrize("life", ["serves, then dies", "serves, then is stuck"])
def test_a_start_does_not_wait_for_one_that_is_lost(life: str) -> None:
    async def run() -> None:
        async with (
            asyncio.timeout(20),
            Supervisor([_maker(life), _maker("waits for another")], grace=0.3, max_busy=1.0) as supervisor,
        ):
            with pytest.raises(EngineDead, match=f"the {life} process .* while another started"):
                await supervisor.ready()

    asyncio.run(run())


@pytest.mark.parametrize("does", ["hangs in its start", "is stopped in its start"])
def test_a_restart_that_hangs_is_a_failed_start(
    does: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> str:
        async with (
            asyncio.timeout(60),
            Supervisor([_maker("serves, then dies", does, "fails")], grace=0.3) as supervisor,
        ):
            await supervisor.ready()
            _hurry(monkeypatch)
            return await supervisor.run_until_unrecoverable()

    assert asyncio.run(run()).endswith("too often in a row")
    told = [record.getMessage() for record in caplog.records if "before it was ready" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith(f"the {does} process ")


def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little patience with a start from now on."""
    monkeypatch.setattr(process, "START_SILENT_SECONDS", 2)
    monkeypatch.setattr(process, "START_BUSY_SECONDS", 0.5)


def test_a_slow_start_that_goes_on_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START_BUSY_SECONDS", 1.5)

    async def run() -> None:
        async with asyncio.timeout(30), Supervisor([_maker("starts slowly")]) as supervisor:
            assert "starts slowly" in await supervisor.ready()

    asyncio.run(run())


def test_words_that_are_no_report_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> str:
        async with asyncio.timeout(30), Supervisor([_maker("says what is no report")]) as supervisor:
            (report,) = (await supervisor.ready()).values()
            keeper = asyncio.ensure_future(supervisor.run_until_unrecoverable())
            await asyncio.sleep(2.0)
            assert not keeper.done()
            keeper.cancel()
            await asyncio.wait([keeper])  # a start that is cut off with its loop does not end
            return str(report.facts["pid"])

    assert int(asyncio.run(run())) > 0
    assert caplog.text.count("wrote b'garbage") == 2
    assert "exceed the limit" in caplog.text


def test_one_that_ignores_sigterm_is_killed() -> None:
    async def run() -> int:
        async with Supervisor([_maker("ignores SIGTERM")], grace=0.3) as supervisor:
            return int(str((await supervisor.ready())["ignores SIGTERM"].facts["pid"]))

    assert not _alive(asyncio.run(run()))


def test_children_end_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio, sys, time\n"
            "from engine.processes.process import Process, ProcessSpec\n"
            "from child_that import Orders\n"
            "async def main():\n"
            "    child = await Process.start(ProcessSpec('c', 'child_that', Orders('ignores SIGTERM')))\n"
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
        async with Supervisor([_maker("serves")]) as supervisor:
            await supervisor.ready()

    asyncio.run(run())


def test_error_kinds_survive_the_report() -> None:
    assert issubclass(AdapterError, InvalidRequest)
    assert ConfigError.kind != InvalidRequest.kind
