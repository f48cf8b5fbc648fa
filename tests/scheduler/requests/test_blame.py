"""Blame by hand: who is suspect after a death, until when, and who is found to have ended the runner."""

from __future__ import annotations

from scheduler.requests.blame import BlameTracker, InFlightPosition


def _stands(*ids: int, reached: int = 7, point: int = 9) -> dict[int, InFlightPosition]:
    return {i: InFlightPosition(reached, point) for i in ids}


def test_a_fault_makes_everyone_in_flight_suspect_and_a_second_one_alone_proves_it() -> None:
    suspects = BlameTracker()
    assert suspects.died(_stands(1, 2, 3), own_fault=True) is None
    assert list(suspects) == [1, 2, 3]
    assert suspects.died(_stands(2), own_fault=True) == 2


def test_who_is_past_its_point_is_suspect_no_more() -> None:
    suspects = BlameTracker()
    suspects.died(_stands(1, 2), own_fault=True)
    assert not suspects.answered(1, 8)
    assert suspects.answered(1, 9)
    assert (list(suspects), 1 in suspects) == ([2], False)
    assert suspects.died(_stands(1), own_fault=True) is None, "it begins anew"
    assert suspects.died(_stands(1), own_fault=True) == 1


def test_nobody_is_found_guilty_in_company() -> None:
    suspects = BlameTracker()
    for _ in range(4):
        assert suspects.died(_stands(1, 2), own_fault=True) is None


def test_the_hands_of_others_are_a_coincidence_at_first() -> None:
    suspects = BlameTracker()
    assert [suspects.died(_stands(1), own_fault=False) for _ in range(2)] == [None, None]
    assert list(suspects) == [1]
    assert [suspects.died(_stands(1), own_fault=False) for _ in range(3)] == [None, None, 1]


def test_who_gets_on_between_two_kills_is_never_suspect() -> None:
    suspects = BlameTracker()
    for point in range(10, 100, 10):
        assert suspects.died(_stands(1, point=point), own_fault=False) is None
        assert not suspects.answered(1, point), "it was no suspect"
    assert (len(suspects), suspects.quiet) == (0, True)


def test_kills_at_different_places_prove_nothing() -> None:
    suspects = BlameTracker()
    for reached in range(8):
        assert suspects.died(_stands(1, reached=reached), own_fault=False) is None


def test_who_has_ended_is_forgotten() -> None:
    suspects = BlameTracker()
    suspects.died(_stands(1, 2), own_fault=True)
    suspects.forget(1)
    suspects.forget(3)
    assert list(suspects) == [2]
    assert not suspects.answered(1, 99)
