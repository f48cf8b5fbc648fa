"""Stop signals: counted by the launcher, ignored by children, blocked in a child until it ignores them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from engine.processes import signals
from engine.processes.signals import STOP_SIGNALS, Stopped, StopRequests


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Restores the handlers of this process."""
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_stop_signal_is_a_request(number: signal.Signals) -> None:
    requests = StopRequests()
    requests.listen()
    _send(number)
    assert requests.count == 1


def test_request_interrupts_only_where_that_is_allowed() -> None:
    requests, cleaned = StopRequests(), []
    requests.listen()

    def work() -> None:
        try:
            _send(signal.SIGTERM)
            raise AssertionError("it was interrupted")
        finally:
            _send(signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(Stopped), requests.interrupting():
        work()
    assert cleaned == [True]
    assert requests.count == 2
    with pytest.raises(Stopped), requests.interrupting():
        raise AssertionError("a request came before")


def test_calls_follow_each_request_even_an_earlier_one() -> None:
    requests, calls = StopRequests(), list[int]()
    requests.listen()
    _send(signal.SIGINT)
    with requests.calling(lambda: calls.append(requests.count)):
        assert calls == [1]
        _send(signal.SIGTERM)
    _send(signal.SIGTERM)
    assert calls == [1, 2]


def test_sighup_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    requests = StopRequests()
    requests.listen()
    _send(signal.SIGHUP)
    assert requests.count == 0


def test_embedded_launcher_counts_its_parents_word_alone() -> None:
    requests = StopRequests()
    requests.listen_for(signal.SIGUSR1)
    signals.ignore()
    for number in STOP_SIGNALS:
        _send(number)
    assert requests.count == 0
    signals.interrupt_main_thread(signal.SIGUSR1)
    assert requests.count == 1


def test_blocked_process_outlives_signals_and_ignores_them_later() -> None:
    program = (
        "import sys\n"
        "print('started', flush=True)\n"
        "sys.stdin.readline()\n"
        "from engine.processes import signals\n"
        "signals.ignore()\n"
        "print('ignoring', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(signals.signal.pthread_sigmask(0, []), flush=True)\n"
    )
    with signals.blocked():
        child = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
    assert child.stdin is not None
    assert child.stdout is not None
    for says in ("started\n", "ignoring\n"):
        assert child.stdout.readline() == says
        for number in STOP_SIGNALS:
            child.send_signal(number)
        child.stdin.write("\n")
    assert child.stdout.read() == "set()\n"
    assert child.wait() == 0
    child.stdin.close()
    child.stdout.close()
    assert not set(STOP_SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])
