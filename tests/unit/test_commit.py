"""All cases of a commit: joined or not, journaled or not, certain or not."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Literal

import pytest

from fennflow.backends import Outcome
from fennflow.engine.commit import Case, Next, next_step
from fennflow.exceptions import (
    BackendUnavailableException,
    ConflictException,
    KeyException,
    RecordLockedException,
    TransactionException,
    TransactionLostException,
)

Joined = Literal["none", "inside", "surrounding"]
JOINED: tuple[Joined, ...] = ("none", "inside", "surrounding")
ANY = (False, True)
CHANGED = Case(journaled=True, sent=True)
REFUSED = (TransactionException, RecordLockedException, KeyException)
UNCERTAIN = (BackendUnavailableException, ConflictException, OSError)


@pytest.mark.parametrize("joined", JOINED)
def test_what_is_journaled_or_has_hooks_takes_a_pivot(joined: Joined) -> None:
    for journaled, hooks, callbacks, reads in product(ANY, repeat=4):
        case = Case(
            journaled=journaled, hooks=hooks, callbacks=callbacks, reads=reads, joined=joined
        )
        if journaled or hooks:
            assert next_step(case) is Next.PIVOT


@pytest.mark.parametrize(
    ("joined", "callbacks", "reads", "then"),
    [
        ("none", False, False, Next.END),
        ("none", False, True, Next.END),
        ("none", True, False, Next.END),
        ("none", True, True, Next.END),
        ("inside", False, False, Next.END),
        ("inside", False, True, Next.PIVOT),
        ("inside", True, False, Next.END),
        ("inside", True, True, Next.PIVOT),
        ("surrounding", False, False, Next.END),
        ("surrounding", False, True, Next.PIVOT),
        ("surrounding", True, False, Next.PIVOT),
        ("surrounding", True, True, Next.PIVOT),
    ],
)
def test_what_has_changed_nothing_takes_a_pivot_only_where_a_joined_transaction_decides_for_it(
    *, joined: Joined, callbacks: bool, reads: bool, then: Next
) -> None:
    assert next_step(Case(joined=joined, callbacks=callbacks, reads=reads)) is then


@pytest.mark.parametrize(
    ("joined", "ended", "then"),
    [
        ("none", False, Next.APPLY),
        ("inside", True, Next.APPLY),
        ("inside", False, Next.WAIT),
        ("surrounding", True, Next.APPLY),
        ("surrounding", False, Next.WAIT),
    ],
)
def test_a_pivot_that_was_written_is_applied_once_the_transaction_that_holds_it_has_ended(
    *, joined: Joined, ended: bool, then: Next
) -> None:
    assert next_step(replace(CHANGED, joined=joined, ended=ended)) is then


@pytest.mark.parametrize("joined", JOINED)
@pytest.mark.parametrize("ended", ANY)
def test_an_error_of_the_pivot_decides_what_is_done_and_the_joined_transaction_does_not(
    *, joined: Joined, ended: bool
) -> None:
    case = replace(CHANGED, joined=joined, ended=ended)
    assert next_step(replace(case, error=TransactionLostException("lost"))) is Next.LEAVE
    for refused in REFUSED:
        assert next_step(replace(case, error=refused("nothing written"))) is Next.ROLL_BACK
    for uncertain in UNCERTAIN:
        unknown = replace(case, error=uncertain("?"))
        assert next_step(unknown) is Next.ASK
        assert next_step(replace(unknown, outcome=Outcome.COMMITTED)) is Next.APPLY
        assert next_step(replace(unknown, outcome=Outcome.ABORTED)) is Next.UNDO
