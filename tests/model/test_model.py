"""Transactions, crashes, faults and recoveries in any order: the engine behaves like the model.

The reference model is a dictionary and the operations of `simulated.py`. After every rule I1, I2, I5
and I6 are checked, by each call I8 and I9, and at the end, when all has been recovered, I3, I4, I7.

The store is in memory, and moto's server in a shorter profile; the backend in memory, on SQLite, on
PostgreSQL, or in the bucket, where the requests of the log meet the faults.
Hypothesis searches and shrinks; a random walk over the same actions is ten times as fast, and
`FENNFLOW_SEED` repeats it. `nox -s model` runs both for as long as one likes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from typing_extensions import override

from actions import (
    CALLS,
    CONTROLS,
    FATES,
    KEYS,
    KILLED,
    MANNERS,
    PAUSES,
    USER_CODE,
    Actions,
    Steps,
    walk,
)
from fennflow.connectors import Capabilities
from fennflow.testing import PostgresqlServer, S3Server
from remote import Remote, remote
from remote_database import RemoteDatabase, remote_database
from simulated import Manner
from world import Fate

MINUTES = float(os.environ.get("FENNFLOW_MODEL_MINUTES", "0"))
"""How long to search; 0 for the quick profile."""

steps = st.lists(st.tuples(st.integers(0, 7), st.sampled_from(FATES)), min_size=1, max_size=25)
keys = st.permutations(KEYS).map(tuple)
indexes = st.integers(0, 7)


class Machine(RuleBasedStateMachine):
    """Up to six transactions at a time, in up to four processes."""

    directory: Path | None = None
    far: Remote | None = None
    actions: Actions

    @initialize(
        capabilities=st.builds(
            Capabilities,
            conditional_create=st.booleans(),
            conditional_delete=st.sampled_from(["batch", "single", "none"]),
            conditional_copy=st.booleans(),
            versioned=st.booleans(),
        ),
        repeats=st.booleans(),
        validate_reads=st.booleans(),
        hide_pending=st.booleans(),
        keep_versions=st.booleans(),
    )
    def begin(self, capabilities: Capabilities, **options: Any) -> None:
        there = None if self.far is None else self.far.renew()
        known = there.capabilities if there else None
        self.actions = Actions(
            known or capabilities, directory=self.directory, server=there, **options
        )

    @rule(index=indexes, auto_commit=st.booleans(), steps=steps)
    def open(self, index: int, auto_commit: bool, steps: Steps) -> None:  # noqa: FBT001
        self.actions.open(index, auto_commit=auto_commit)
        self.actions.run(steps)

    @precondition(lambda self: self.actions.waiting)
    @rule(
        index=indexes,
        call=st.tuples(st.sampled_from(CALLS), st.sampled_from(MANNERS)),
        keys=keys,
        size=st.integers(1, 3),
        steps=steps,
    )
    def call(
        self, index: int, call: tuple[str, Manner], keys: tuple[str, ...], size: int, steps: Steps
    ) -> None:
        kind, manner = call
        chosen = keys[: 2 if kind in {"copy", "move"} else size]
        self.actions.call(index, kind, chosen, manner)
        self.actions.run(steps)

    @precondition(lambda self: self.actions.waiting)
    @rule(
        index=indexes,
        kind=st.sampled_from((*CONTROLS, *USER_CODE)),
        manner=st.sampled_from(MANNERS),
        steps=steps,
    )
    def control(self, index: int, kind: str, manner: Manner, steps: Steps) -> None:
        self.actions.control(index, kind, manner)
        self.actions.run(steps)

    @precondition(lambda self: self.actions.living)
    @rule(index=indexes, steps=steps)
    def cancel(self, index: int, steps: Steps) -> None:
        self.actions.cancel(index)
        self.actions.run(steps)

    @rule(steps=steps)
    def run(self, steps: Steps) -> None:
        self.actions.run(steps)

    @rule(seconds=st.sampled_from(PAUSES))
    def wait(self, seconds: float) -> None:
        self.actions.wait(seconds)

    @precondition(lambda self: self.actions.world.late)
    @rule(index=indexes)
    def arrive(self, index: int) -> None:
        self.actions.arrive(index)

    @rule(index=indexes, fate=st.sampled_from(KILLED))
    def kill(self, index: int, fate: Fate) -> None:
        self.actions.kill(index, fate)

    @rule(index=indexes)
    def stop_or_wake(self, index: int) -> None:
        self.actions.stop_or_wake(index)

    @rule(steps=steps)
    def recover(self, steps: Steps) -> None:
        self.actions.recover()
        self.actions.run(steps)

    @precondition(lambda self: self.actions.world.held)
    @rule(index=indexes, commits=st.booleans(), steps=steps)
    def decide(self, index: int, commits: bool, steps: Steps) -> None:  # noqa: FBT001
        self.actions.decide(index, commits=commits)
        self.actions.run(steps)

    @rule(key=st.sampled_from(KEYS))
    def somebody_else_puts(self, key: str) -> None:
        self.actions.somebody_else_puts(key)

    @rule()
    def vanish(self) -> None:
        self.actions.vanish()

    @rule(key=st.sampled_from(KEYS))
    def bar(self, key: str) -> None:
        self.actions.bar(key)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "actions"):
            self.actions.check()

    @override
    def teardown(self) -> None:
        if hasattr(self, "actions"):
            self.actions.finish()


def search(
    directory: Path | None,
    examples: int,
    *,
    far: Remote | None = None,
) -> None:
    """Let hypothesis search for a schedule that breaks an invariant."""

    class There(Machine):
        pass

    There.directory = directory
    There.far = far
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        There,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=checks,
            phases=[Phase.generate, Phase.shrink],
            database=None,
            print_blob=True,
        ),
    )


def repeat(walk: Callable[[int], object], walks: int) -> None:
    """Walk at random, from the seed of the run on."""
    first = int(os.environ["FENNFLOW_SEED"]) * 1_000_000
    end = time.monotonic() + MINUTES * 60
    number = 0
    while number < walks or time.monotonic() < end:
        walk(first + number)
        number += 1


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.timeout(int(600 + 120 * MINUTES))
def test_a_search_finds_nothing_in_memory() -> None:
    search(None, examples=40 + int(300 * MINUTES))


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.timeout(int(600 + 120 * MINUTES))
def test_a_search_finds_nothing_on_sqlite() -> None:
    with tempfile.TemporaryDirectory() as directory:
        search(Path(directory), examples=15 + int(50 * MINUTES))


@pytest.mark.sampled
@pytest.mark.timeout(int(600 + 120 * MINUTES))
def test_a_walk_finds_nothing_in_memory() -> None:
    repeat(walk, 120)


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.timeout(int(600 + 120 * MINUTES))
def test_a_walk_finds_nothing_on_sqlite() -> None:
    with tempfile.TemporaryDirectory() as directory:
        repeat(partial(walk, directory=Path(directory)), 25)


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.timeout(int(600 + 120 * MINUTES))
def test_a_walk_finds_nothing_with_the_catalog_in_the_bucket() -> None:
    with tempfile.TemporaryDirectory() as directory:
        repeat(partial(walk, logs=Path(directory)), 8)


@pytest.fixture(scope="module")
def database(postgresql: PostgresqlServer) -> Generator[RemoteDatabase]:
    with remote_database(postgresql) as database:
        yield database


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.timeout(int(600 + 120 * MINUTES))
def test_a_walk_finds_nothing_on_postgresql(database: RemoteDatabase) -> None:
    repeat(partial(walk, database=database), 2)


@pytest.mark.parametrize("seed", range(8))
def test_a_walk_is_the_same_for_the_same_seed(seed: int) -> None:
    assert walk(seed) == walk(seed)


@pytest.fixture(scope="module")
def far(moto: S3Server) -> Generator[Remote]:
    with remote(moto) as far:
        yield far


@pytest.mark.once
@pytest.mark.parametrize("versioning", [None, "Enabled"])
@pytest.mark.sampled
@pytest.mark.timeout(int(600 + 120 * MINUTES))
def test_a_walk_finds_nothing_on_a_real_server(
    far: Remote, versioning: Literal["Enabled"] | None
) -> None:
    def walk_there(seed: int) -> None:
        there = far.renew(versioning)
        assert there.capabilities is not None
        assert there.capabilities.versioned == (versioning is not None)
        walk(seed, server=there, capabilities=there.capabilities)

    repeat(walk_there, 2)


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.timeout(int(600 + 120 * MINUTES))
def test_a_search_finds_nothing_on_a_real_server(far: Remote) -> None:
    search(None, examples=3 + int(20 * MINUTES), far=far)
