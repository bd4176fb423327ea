"""Contending writers of the log in the bucket: the one that has waited longest is next."""

from __future__ import annotations

import pytest

from fennflow_bucket import turns
from fennflow_bucket.turns import QUIET, SHORT, STREAK, TURN, Turns


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    return clock


def test_a_writer_alone_does_not_pause(clock: Clock) -> None:
    mine = Turns(round_trip=1.0)
    for _ in range(3 * STREAK):
        assert mine.pause(0.0) == 0.0
        clock.now += 2.0
        mine.won(0.0)
        clock.now += 1.0
    assert not mine.contended


def test_a_writer_that_has_waited_less_than_the_last_one_lets_others_send_first(
    clock: Clock,
) -> None:
    mine = Turns(round_trip=1.0)
    mine.saw(10.0)
    clock.now += 0.1
    assert mine.contended
    assert mine.pause(0.0) == pytest.approx(SHORT)
    assert mine.pause(5.0) == pytest.approx(SHORT / 2)
    assert mine.pause(11.0) == 0.0
    clock.now += QUIET
    assert mine.pause(0.0) == 0.0


def test_a_writer_that_never_stops_lets_others_have_a_turn(clock: Clock) -> None:
    mine = Turns(round_trip=0.1)
    pauses: list[float] = []
    for _ in range(3 * STREAK):
        pauses.append(mine.pause(0.0))
        clock.now += pauses[-1] + 0.1
        mine.won(0.0)
    assert pauses.count(TURN * 0.1) == 2
    assert pauses.count(0.0) == len(pauses) - 2
