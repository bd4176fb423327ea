"""The model of the log in the bucket: random schedules break no rule, and find when one is missing."""

from __future__ import annotations

import pytest

from log_model import MECHANISMS, run


def test_no_schedule_breaks_the_log() -> None:
    assert [found for seed in range(600) if (found := run(seed))] == []


@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_no_schedule_of_many_breaks_the_log() -> None:
    assert [found for seed in range(200_000) if (found := run(seed))] == []


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_without_a_mechanism_a_schedule_breaks_the_log(mechanism: str) -> None:
    assert all(run(seed, mechanism) for seed in MECHANISMS[mechanism])
