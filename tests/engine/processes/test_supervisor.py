"""Child processes start by name, report once, are replaced when they exit or hang, and never outlive their parent."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures.processes.child_that import Orders

from engine.errors import AdapterError, ConfigError, EngineDead, InvalidRequest
from engine.processes import supervisor as supervision
from engine.processes.process import Process, ProcessSpec
from engine.processes.supervisor import SpecFactory, Supervisor
from engine.processes.vital_signs import Limits, ProcessExit

SHORT_WORK = Limits(silent=5, busy=1.0)
SHORT_START = Limits(silent=2, busy=0.5, waiting=2)
FIXTURES = str(Path(__file__).parents[2] / "fixtures" / "processes")
ENVIRONMENT = {"PYTHONPATH": FIXTURES}


def _spec(does: str) -> ProcessSpec:
    return ProcessSpec(does, "child_that", Orders(does), environment=ENVIRONMENT)


def _factory(*lives: str) -> SpecFactory:
    """Makes incarnation i behave as `lives[i]`; the last item applies to all later incarnations."""
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


def test_ready_is_read_past_prints_and_stop_ends_a_process() -> None:
    async def run() -> int:
        process = await Process.start(_spec("serves"))
        report = await process.report()
        assert report.facts == {"pid": process.pid}
        await process.stop(10)
        assert await process.watch() == ProcessExit("exited with code 0", own_fault=False)
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
def test_failed_start_raises_its_reason(does: str, error: type[Exception], words: str) -> None:
    async def run() -> None:
        async with Supervisor([_factory("serves"), _factory(does)]) as supervisor:
            await supervisor.ready()

    with pytest.raises(error, match=words):
        asyncio.run(run())


def test_reported_error_is_preferred_to_engine_dead() -> None:
    async def run() -> None:
        async with Supervisor([_factory("dies"), _factory("fails"), _factory("serves")]) as supervisor:
            await asyncio.sleep(0.5)
            await supervisor.ready()

    with pytest.raises(InvalidRequest, match="cut file"):
        asyncio.run(run())


def test_too_many_deaths_in_a_row_stop_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "MAX_DEATHS", 2)

    async def run() -> tuple[str, list[int]]:
        async with Supervisor([_factory("serves"), _factory("serves again")]) as supervisor:
            await supervisor.ready()
            pids = supervisor.pids()
            end = asyncio.ensure_future(supervisor.run_until_unrecoverable())
            while not end.done():
                if supervisor._keepers[1].serves:
                    pids.append(supervisor.pids()[1])
                    os.kill(pids[-1], signal.SIGKILL)
                await asyncio.sleep(0.1)
            return end.result(), pids

    death, pids = asyncio.run(run())
    assert death == "the serves again process was killed by signal 9, and that too often in a row"
    assert len(set(pids)) == 4
    assert not any(map(_alive, pids))


def test_deaths_that_requests_cause_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "MAX_DEATHS", 1)
    excuses = iter([True, True, True, False, False])
    lives = _factory("serves, then dies")
    begun: list[int] = []

    def make(incarnation: int, after_fault: bool) -> ProcessSpec:
        begun.append(incarnation)
        return dataclasses.replace(lives(incarnation, after_fault), is_excused=lambda: next(excuses))

    async def run() -> str:
        async with Supervisor([make]) as supervisor:
            await supervisor.ready()
            return await supervisor.run_until_unrecoverable()

    assert asyncio.run(run()).endswith("too often in a row")
    assert begun == [0, 1, 2, 3, 4], "three deaths were excused, and of the other two the second was one too many"


def test_three_failed_starts_in_a_row_are_unrecoverable() -> None:
    async def run() -> str:
        async with Supervisor([_factory("serves, then dies", "fails")]) as supervisor:
            await supervisor.ready()
            return await supervisor.run_until_unrecoverable()

    reason = asyncio.run(run())
    assert reason.startswith("the fails process ")
    assert reason.endswith("too often in a row")


def test_own_fault_is_told_from_a_kill_from_outside() -> None:
    after_faults: list[bool] = []

    def make(incarnation: int, after_fault: bool) -> ProcessSpec:
        after_faults.append(after_fault)
        return _spec("serves, then dies" if incarnation == 0 else "serves")

    async def run() -> None:
        async with Supervisor([make]) as supervisor:
            await supervisor.ready()
            second = await _replaced(supervisor, supervisor.pids()[0])
            os.kill(second, signal.SIGKILL)
            await _replaced(supervisor, second)

    asyncio.run(run())
    assert after_faults == [False, True, False]


def test_failed_start_keeps_the_fault_of_the_one_before() -> None:
    after_faults: list[bool] = []
    lives = _factory("serves", "fails", "serves")

    def make(incarnation: int, after_fault: bool) -> ProcessSpec:
        after_faults.append(after_fault)
        return lives(incarnation, after_fault)

    async def run() -> None:
        async with Supervisor([make]) as supervisor:
            await supervisor.ready()
            os.kill(supervisor.pids()[0], signal.SIGKILL)
            async with asyncio.timeout(20):
                while len(after_faults) < 3:
                    await asyncio.sleep(0.05)

    asyncio.run(run())
    assert after_faults == [False, False, False], "a failed start is not the fault of requests in flight"


async def _replaced(supervisor: Supervisor, first: int) -> int:
    """Waits until the incarnation after `first` serves and returns its process id."""
    async with asyncio.timeout(20):
        while supervisor.pids()[0] == first or not supervisor._keepers[0].serves:
            await asyncio.sleep(0.05)
    return supervisor.pids()[0]


@pytest.mark.parametrize("life", ["serves, then dies", "serves, then is stuck", "serves, then falls silent"])
def test_dead_stuck_or_silent_process_is_replaced(life: str) -> None:
    async def run() -> tuple[int, int]:
        async with Supervisor([_factory(life, "serves")], serving=SHORT_WORK) as supervisor:
            first = int(str((await supervisor.ready())[life].facts["pid"]))
            return first, await _replaced(supervisor, first)

    first, second = asyncio.run(run())
    assert first != second
    assert not _alive(first)


def test_stopped_process_is_replaced() -> None:
    async def run() -> tuple[int, int]:
        async with Supervisor([_factory("serves")], serving=Limits(silent=2, busy=120.0)) as supervisor:
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
        ("falls silent in its start", "gave no sign of life for 2 seconds and was killed before it was ready"),
        ("waits for another", "waited for the others, which serve already, for 2 seconds and was killed"),
    ],
)
def test_hanging_first_start_is_killed(does: str, words: str) -> None:
    async def run() -> list[int]:
        async with (
            asyncio.timeout(30),
            Supervisor([_factory("serves"), _factory(does)], grace=0.3, starting=SHORT_START) as supervisor,
        ):
            pids = supervisor.pids()
            with pytest.raises(EngineDead, match=f"the {does} process {words}"):
                await supervisor.ready()
            return pids

    assert not any(map(_alive, asyncio.run(run())))


@pytest.mark.parametrize("life", ["serves, then dies", "serves, then is stuck"])
def test_first_start_fails_when_another_process_is_lost(life: str) -> None:
    async def run() -> None:
        async with (
            asyncio.timeout(20),
            Supervisor([_factory(life), _factory("waits for another")], grace=0.3, serving=SHORT_WORK) as supervisor,
        ):
            with pytest.raises(EngineDead, match=f"the {life} process .* while another started"):
                await supervisor.ready()

    asyncio.run(run())


@pytest.mark.parametrize("does", ["hangs in its start", "is stopped in its start"])
def test_hanging_restart_is_a_failed_start(does: str, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> str:
        async with (
            asyncio.timeout(60),
            Supervisor([_factory("serves, then dies", does, "fails")], grace=0.3, starting=SHORT_START) as supervisor,
        ):
            await supervisor.ready()
            return await supervisor.run_until_unrecoverable()

    assert asyncio.run(run()).endswith("too often in a row")
    told = [record.getMessage() for record in caplog.records if "before it was ready" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith(f"the {does} process ")


@pytest.mark.parametrize("does", ["starts slowly", "waits with progress"])
def test_slow_start_with_progress_is_waited_for(does: str) -> None:
    limits = Limits(silent=60, busy=1.5, waiting=2)

    async def run() -> None:
        async with (
            asyncio.timeout(30),
            Supervisor([_factory("serves"), _factory(does)], starting=limits) as supervisor,
        ):
            assert does in await supervisor.ready()

    asyncio.run(run())


def test_lines_that_are_no_report_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> str:
        async with asyncio.timeout(30), Supervisor([_factory("writes garbage lines")]) as supervisor:
            (report,) = (await supervisor.ready()).values()
            await asyncio.sleep(2.0)
            assert supervisor.pids() == [report.facts["pid"]], "it was not replaced"
            return str(report.facts["pid"])

    assert int(asyncio.run(run())) > 0
    assert caplog.text.count("wrote b'garbage") == 2
    assert "exceed the limit" in caplog.text


def test_process_that_starts_no_more_fails_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def first() -> None:
        async with Supervisor([_factory("serves")]):
            raise AssertionError("it cannot start")

    async def again() -> str:
        async with Supervisor([_factory("serves")]) as supervisor:
            await supervisor.ready()
            with monkeypatch.context() as broken:
                broken.setattr(sys, "executable", "/nowhere/python")
                os.kill(supervisor.pids()[0], signal.SIGKILL)
                return await supervisor.run_until_unrecoverable()

    assert asyncio.run(again()) == "the serves process did not start, and that too often in a row"
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineDead, match=r"the serves process cannot be started .*No such file"):
        asyncio.run(first())


def test_config_that_is_not_read_delays_nothing() -> None:
    deaf = ProcessSpec("deaf", "child_that", Orders("x" * (1 << 20)), ["reads nothing"], environment=ENVIRONMENT)

    async def run() -> list[int]:
        async with (
            asyncio.timeout(30),
            Supervisor([lambda *_: deaf, _factory("serves")], grace=0.3, starting=SHORT_START) as supervisor,
        ):
            pids = supervisor.pids()
            with pytest.raises(EngineDead, match="the deaf process gave no sign of life for 2 seconds"):
                await supervisor.ready()
            return pids

    assert not any(map(_alive, asyncio.run(run())))


def test_end_is_noticed_though_its_pipes_stay_open() -> None:
    async def run() -> None:
        async with asyncio.timeout(15), Supervisor([_factory("dies and leaves its pipes open")]) as supervisor:
            with pytest.raises(EngineDead, match="exited with code 7 before it was ready"):
                await supervisor.ready()

    asyncio.run(run())


def test_process_is_restarted_while_another_one_stops() -> None:
    """The runner is: the streams that the tokenizer process lets finish need it."""

    async def run() -> None:
        async with asyncio.timeout(30), Supervisor([_factory("serves"), _factory("stops slowly")]) as supervisor:
            await supervisor.ready()
            first = supervisor.pids()[0]
            stopping = asyncio.ensure_future(supervisor.stop(20.0))
            await asyncio.sleep(0.1)
            os.kill(first, signal.SIGKILL)
            assert await _replaced(supervisor, first)
            assert not stopping.done()
            second = supervisor.pids()[0]
            await stopping
            assert not _alive(second)

    asyncio.run(run())


def test_kill_restarts_nothing() -> None:
    async def run() -> None:
        async with asyncio.timeout(30), Supervisor([_factory("serves"), _factory("ignores the stop")]) as supervisor:
            await supervisor.ready()
            pids = supervisor.pids()
            stopping = asyncio.ensure_future(supervisor.stop(20.0))
            await asyncio.sleep(0.1)
            supervisor.kill()
            await stopping
            assert supervisor.pids() == pids
            assert not any(map(_alive, pids))

    asyncio.run(run())


def test_process_that_ignores_the_stop_is_killed() -> None:
    async def run() -> int:
        async with Supervisor([_factory("ignores the stop")], grace=0.3) as supervisor:
            return int(str((await supervisor.ready())["ignores the stop"].facts["pid"]))

    assert not _alive(asyncio.run(run()))


def test_child_exits_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio, sys, time\n"
            "from engine.processes.process import Process, ProcessSpec\n"
            "from child_that import Orders\n"
            "async def main():\n"
            "    child = await Process.start(ProcessSpec('c', 'child_that', Orders('ignores the stop')))\n"
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


def test_hostile_package_in_the_cwd_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("engine", "msgspec", "child_that"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('hostile')")
    monkeypatch.chdir(tmp_path)

    async def run() -> None:
        async with Supervisor([_factory("serves")]) as supervisor:
            await supervisor.ready()

    asyncio.run(run())


def test_error_kinds_are_kept_in_reports() -> None:
    assert issubclass(AdapterError, InvalidRequest)
    assert ConfigError.kind != InvalidRequest.kind
