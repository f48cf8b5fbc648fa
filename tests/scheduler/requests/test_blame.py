"""scheduler.requests.blame: which requests are suspects, until when, and which one is proved to blame."""

from __future__ import annotations

from scheduler.requests.blame import BlameTracker, InFlightPosition


def _positions(*ids: int, reached: int = 7, point: int = 9) -> dict[int, InFlightPosition]:
    return {i: InFlightPosition(reached, point) for i in ids}


def test_second_fault_with_a_suspect_alone_proves_it() -> None:
    blame = BlameTracker()
    assert blame.runner_died(_positions(1, 2, 3), own_fault=True) is None
    assert list(blame) == [1, 2, 3]
    assert blame.runner_died(_positions(2), own_fault=True) == 2


def test_request_past_its_point_is_no_suspect() -> None:
    blame = BlameTracker()
    blame.runner_died(_positions(1, 2), own_fault=True)
    assert not blame.chunk_answered(1, 8)
    assert blame.chunk_answered(1, 9)
    assert (list(blame), 1 in blame) == ([2], False)
    assert blame.runner_died(_positions(1), own_fault=True) is None, "nothing was held against it any more"
    assert blame.runner_died(_positions(1), own_fault=True) == 1


def test_fault_with_two_requests_in_flight_proves_nothing() -> None:
    blame = BlameTracker()
    for _ in range(4):
        assert blame.runner_died(_positions(1, 2), own_fault=True) is None


def test_first_kill_is_a_coincidence_and_the_fifth_proves() -> None:
    blame = BlameTracker()
    assert [blame.runner_died(_positions(1), own_fault=False) for _ in range(2)] == [None, None]
    assert list(blame) == [1]
    assert [blame.runner_died(_positions(1), own_fault=False) for _ in range(3)] == [None, None, 1]


def test_request_that_advances_between_kills_is_no_suspect() -> None:
    blame = BlameTracker()
    for point in range(10, 100, 10):
        assert blame.runner_died(_positions(1, point=point), own_fault=False) is None
        assert not blame.chunk_answered(1, point), "it was no suspect"
    assert (len(blame), blame.is_empty) == (0, True)


def test_kills_at_different_positions_prove_nothing() -> None:
    blame = BlameTracker()
    for reached in range(8):
        assert blame.runner_died(_positions(1, reached=reached), own_fault=False) is None


def test_ended_request_is_forgotten() -> None:
    blame = BlameTracker()
    blame.runner_died(_positions(1, 2), own_fault=True)
    blame.forget(1)
    blame.forget(3)
    assert list(blame) == [2]
    assert not blame.chunk_answered(1, 99)
