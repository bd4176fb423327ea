"""Each mechanism of the protocol switched off, one at a time: the random walk finds all of them.

A mechanism whose loss is not found would be untested or unnecessary. The check of the lease before
each request (P23) is not among them: the fencing tokens of the journal stop its owner nearly always,
and what is left has tests of its own in `tests/crashes` and `tests/faults`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import tempfile
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from actions import KEYS, MOST_STEPS, Actions, Habits, walk
from fennflow.backends import (
    Commit,
    Decision,
    Job,
    JournaledTransaction,
    ObjectKey,
    Settlement,
    Step,
    TransactionToken,
)
from fennflow.connectors import Capabilities, Connector, Deletion
from fennflow.engine import callbacks, finish, jobs, recovery, session, transaction, writing
from fennflow.engine.callbacks import Callback
from fennflow.exceptions import (
    AccessDeniedException,
    NoSuchNamespaceException,
    TransactionLostException,
)
from fennflow.testing.backend_values import new_transaction
from fennflow_bucket import replica
from fennflow_memory.backend import InMemoryBackend
from fennflow_memory.connector import InMemoryConnector
from watched_log import WatchedLog
from world import BUCKET, LEASE, Fate, Quirks, World

WALKS = 6000
"""How many walks a mutation may survive; each takes about 60 ms.

Two mutations take 300 on average: with 2,000 one commit in two hundred would miss one of them.
"""

Mutation = Callable[[ExitStack], None]

WORKS = [Fate.WORKS] * 12
PLAIN = Capabilities(conditional_create=True, conditional_delete="single", conditional_copy=True)
WEAK = Capabilities()
# Mutations that need many events of few kinds are searched by walks that do little else.
USER_CODE = {
    "habits": Habits(
        keys="a",
        calls=["put"],
        controls=["end", "raise", "hook", "hook", "step", "step"],
        fates=WORKS,
        happens=["cancel"],
    )
}
BARRED = {
    "habits": Habits(
        keys=KEYS,
        calls=["put", "put", "delete"],
        controls=["end"],
        fates=WORKS,
        happens=["bar", "kill"],
    )
}
JOBS: Mapping[str, Any] = {
    "capabilities": PLAIN,
    "habits": Habits(
        keys="a",
        calls=["put"],
        controls=[
            "end",
            "raise",
            "commit",
            "savepoint",
            "fail",
            *["durable_step", "durable_hook"] * 3,
        ],
        fates=WORKS,
        happens=["recover"],
    ),
}
HELD: Mapping[str, Any] = {
    "capabilities": PLAIN,
    "habits": Habits(
        keys="ab",
        calls=["put"],
        controls=["hold", "hold", "hold", "durable_step"],
        fates=WORKS,
        happens=["decide"] * 4 + ["recover", "wait", "kill"],
        pauses=[5.0, LEASE + 1],
    ),
}
NARROW: Mapping[str, Mapping[str, Any]] = {
    "no_read_back": {
        "capabilities": PLAIN,
        "habits": Habits(
            keys="a",
            calls=["put", "create"],
            controls=["end"],
            fates=[Fate.WORKS, Fate.REPEATED],
            happens=(),
            strikes={"put"},
        ),
    },
    "no_check_of_reads": {
        "capabilities": PLAIN,
        "habits": Habits(
            keys="a", calls=["put", "get", "get"], controls=["commit"], fates=WORKS, happens=()
        ),
    },
    "no_end": {
        "capabilities": PLAIN,
        "habits": Habits(
            keys="a",
            calls=["put", "delete"],
            controls=["commit", "rollback"],
            fates=[Fate.WORKS, Fate.LOST],
            happens=(),
            strikes={"settle"},
        ),
    },
    "no_shield": {
        "habits": Habits(
            keys="a", calls=["put"], controls=["end"], fates=WORKS, happens=["cancel", "cancel"]
        ),
    },
    "no_kept_locks": {
        "capabilities": WEAK,
        "habits": Habits(
            keys="a",
            calls=["put", "delete"],
            controls=["commit"],
            fates=[Fate.WORKS, Fate.LATE],
            happens=(),  # what is late arrives at the end
            strikes={"delete"},
            sessions=1,
            bursts=[16],
        ),
    },
    "no_other_callbacks": USER_CODE,
    "no_second_undo": {
        "habits": Habits(
            keys="a",
            calls=["put"],
            controls=["step"],
            fates=WORKS,
            happens=["cancel"] * 3,
            manners=["is slow"],
        ),
    },
    "all_ambiguous": {
        "habits": Habits(
            keys="a",
            calls=["put", "delete"],
            controls=["end"],
            fates=[Fate.WORKS, Fate.REFUSED],
            happens=(),
            strikes={"put", "copy", "delete"},
        ),
    },
    "no_ambiguous_refusals": {
        "capabilities": PLAIN,
        "habits": Habits(
            keys="a",
            calls=["put"],
            controls=["end", "raise"],
            fates=[Fate.WORKS, Fate.DENIED],
            happens=(),
            strikes={"put"},
        ),
    },
    "no_release_of_others": BARRED,
    "no_split_batches": BARRED,
    "no_report": BARRED,
    "no_copy_over_nothing": {
        "capabilities": PLAIN,
        "quirks": Quirks(missing_is_404=True),
        "habits": Habits(
            keys="a", calls=["put"], controls=["commit"], fates=WORKS, happens=["vanish"] * 3
        ),
    },
    "no_scopes": {
        "habits": Habits(
            keys="ab",
            calls=["both"],
            controls=["end"],
            fates=WORKS,
            happens=(),
            manners=["fails"],
        ),
    },
    "no_compensation_journaled": JOBS,
    "no_decision_awaited": JOBS,
    "no_release": JOBS,
    "no_release_of_failed_steps": JOBS,
    "no_removal": JOBS,
    "no_second_journaling": {
        "capabilities": PLAIN,
        "habits": Habits(
            keys="a",
            calls=["put"],
            controls=["durable_step"],
            fates=WORKS,
            happens=["stop", "stop", "recover", "wait"],
            pauses=[LEASE + 1],
        ),
    },
    "no_order_of_compensations": {
        "capabilities": PLAIN,
        "habits": replace(JOBS["habits"], controls=[*["durable_step"] * 4, "raise"]),
    },
    "no_lease_of_jobs": JOBS,
    "no_next_attempt": JOBS,
    "no_hooks_in_the_pivot": JOBS,
    "no_order_of_hooks": JOBS,
    "no_longer_lease_of_held": HELD,
    "no_return_to_held": HELD,
    "no_shield_of_decisions": {
        "capabilities": PLAIN,
        "habits": Habits(
            keys="a",
            calls=["put"],
            controls=["hold"],
            fates=WORKS,
            happens=["decide", "cancel"] * 4,
            sessions=1,
            bursts=[2, 4, 8],
        ),
    },
}


def step_until(world: World, happens: Callable[[], object]) -> None:
    for _ in range(MOST_STEPS):
        if happens():
            return
        world.loop.step()
    pytest.fail("it never happens")


def clock_behind() -> None:
    """A process dies, and one whose clock is behind recovers, with the catalog in the bucket."""
    with tempfile.TemporaryDirectory() as directory:
        log = WatchedLog(Path(directory), BUCKET, skews=(-4000.0,))
        actions = Actions(PLAIN, log=log)
        try:
            actions.open(0, auto_commit=True)
            step_until(actions.world, lambda: actions.waiting)
            actions.call(0, "put", ("a",))
            step_until(actions.world, lambda: actions.waiting)
            actions.kill(0, Fate.FAILS)
            actions.wait(LEASE + 1)
            assert actions.world.recover().compensated == 1
        finally:
            actions.world.close()


def claimed_meanwhile() -> None:
    """A recoverer is stopped right after its claim, and the owner of the transaction goes on."""
    random.seed(0)  # of the pauses between two attempts
    actions = Actions(PLAIN)
    world = actions.world
    until = partial(step_until, world)
    try:
        actions.open(0, auto_commit=True)
        until(lambda: actions.waiting)
        actions.call(0, "put", ("a",))
        until(lambda: actions.waiting)
        owner = actions.processes[0]
        world.loop.stopped.add(owner)
        actions.wait(LEASE + 1)
        actions.recover()
        recoverer = actions.processes[-1]
        until(lambda: any(each.lease_left > 0 for each in world.transactions()))
        world.loop.stopped ^= {owner, recoverer}
        until(lambda: not world.pending)  # the owner renews its lease
        actions.call(0, "put", ("b",))
        until(lambda: actions.waiting)
        world.loop.stopped ^= {owner, recoverer}
        until(lambda: not world.transactions())
        actions.check()
        actions.end()
    finally:
        world.close()


def decided_twice() -> None:
    """Two callers decide a held transaction at the same time: the first one loses it to the second."""
    world = Actions(PLAIN).world
    try:
        backend, token = world.observer, new_transaction()
        world.now_do(backend.begin_writes(token, [ObjectKey(BUCKET, "a")], lambda _: ()))
        world.now_do(backend.hold(token, Commit(), 600.0))
        first = world.now_do(backend.take_held(token.transaction_id))
        second = world.now_do(backend.take_held(token.transaction_id))
        assert first is not None
        assert second is not None
        with suppress(TransactionLostException):
            world.now_do(backend.commit(first.token, Commit()))
            raise AssertionError
        world.now_do(backend.abort(second.token))
    finally:
        world.close()


DIRECTED: Mapping[str, Callable[[], None]] = {
    "no_fencing": claimed_meanwhile,
    "no_fencing_of_held": decided_twice,
    "no_time_of_the_store": clock_behind,
}
"""Schedules that random walks reach too rarely."""


def changed(stack: ExitStack, target: object, name: str, value: object) -> None:
    stack.enter_context(mock.patch.object(target, name, value))


def no_read_back(stack: ExitStack) -> None:
    """P14: a 412 means that another writer's object is there."""
    changed(stack, writing, "made_by", lambda *_: False)


def no_lock(stack: ExitStack) -> None:
    """P3: locks are ignored."""
    original = InMemoryBackend.begin_writes

    async def begin_writes(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._tables.locks.clear()
        return await original(self, *args, **kwargs)

    changed(stack, InMemoryBackend, "begin_writes", begin_writes)


def no_condition_of_compensation(stack: ExitStack) -> None:
    """P18: any object at the key is deleted, unseen."""

    async def resolve(_: Any, step: Any) -> Sequence[Deletion]:
        return [Deletion(location=step.location)]

    changed(stack, finish.Finisher, "_resolve", resolve)


def no_probe(stack: ExitStack) -> None:
    """P15: the store is assumed to enforce every condition."""

    async def capabilities(_: Any, namespace: str, *, refresh: bool = False) -> Capabilities:
        del namespace, refresh
        return Capabilities(
            conditional_create=True, conditional_delete="batch", conditional_copy=True
        )

    changed(stack, InMemoryConnector, "capabilities", capabilities)


def no_fencing(stack: ExitStack) -> None:
    """P24: a claimed transaction still belongs to its old owner, too."""
    original = InMemoryBackend.claim

    async def claim(self: Any, limit: int) -> Sequence[JournaledTransaction]:
        found = await original(self, limit)
        for each in found:
            self._tables.transactions[each.token.transaction_id].fence = 0
        return [replace(each, token=TransactionToken(each.token.transaction_id)) for each in found]

    changed(stack, InMemoryBackend, "claim", claim)


def no_late_writes(stack: ExitStack) -> None:
    """P20 a: late writes are not recorded."""
    changed(stack, InMemoryBackend, "_record_late_writes", lambda *_: None)


def no_kept_locks(stack: ExitStack) -> None:
    """P20 b: a key is free though a deletion of it may still arrive."""
    original = InMemoryBackend.settle

    async def settle_(self: Any, token: TransactionToken, settlement: Settlement) -> None:
        await original(self, token, replace(settlement, keep_locked=()))

    changed(stack, InMemoryBackend, "settle", settle_)


def no_check_of_reads(stack: ExitStack) -> None:
    """P29: any object at a location is returned, whatever it is."""
    original = InMemoryConnector.get

    async def get(self: Any, namespace: str, location: Any, *, if_match: Any = None) -> Any:
        stored, body = await original(self, namespace, location)
        return replace(stored, etag=if_match or stored.etag), body

    changed(stack, InMemoryConnector, "get", get)


def no_write_ahead(stack: ExitStack) -> None:
    """P2: intents are not journaled before the bytes are sent."""
    original = InMemoryBackend.begin_writes

    async def begin_writes(self: Any, token: TransactionToken, *args: Any, **kwargs: Any) -> Any:
        records = await original(self, token, *args, **kwargs)
        self._tables.transactions[token.transaction_id].intents.clear()
        return records

    changed(stack, InMemoryBackend, "begin_writes", begin_writes)


def no_end(stack: ExitStack) -> None:
    """P6: a transaction whose rows are gone is finished once more."""
    keys: dict[str, set[ObjectKey]] = {}
    steps: dict[str, Sequence[Step]] = {}
    begin_writes, commit, abort = (
        InMemoryBackend.begin_writes,
        InMemoryBackend.commit,
        InMemoryBackend.abort,
    )

    async def begin_writes_(
        self: Any, token: TransactionToken, locked: Any, *args: Any, **kwargs: Any
    ) -> Any:
        keys.setdefault(token.transaction_id, set()).update(locked)
        return await begin_writes(self, token, locked, *args, **kwargs)

    async def commit_(self: Any, token: TransactionToken, pivot: Commit) -> None:
        steps[token.transaction_id] = pivot.steps
        await commit(self, token, pivot)

    async def abort_(self: Any, token: TransactionToken, **kwargs: Any) -> Decision:
        found = await abort(self, token, **kwargs)
        if not found.finished:
            return found
        held, left = keys.get(token.transaction_id, set()), steps.get(token.transaction_id, ())
        return replace(found, finished=False, keys=held, steps=left)

    for name, value in (("begin_writes", begin_writes_), ("commit", commit_), ("abort", abort_)):
        changed(stack, InMemoryBackend, name, value)


async def exposed(
    work: Coroutine[Any, Any, Any], **_: Any
) -> tuple[asyncio.Task[Any], asyncio.CancelledError | None]:
    """Like `shielded`, but let a cancellation through."""
    task = asyncio.ensure_future(work)
    cancellation = None
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError as error:
        cancellation = error
        task.cancel()
        await asyncio.wait({task})
    return task, cancellation


def no_shield(stack: ExitStack) -> None:
    """P21: a cancellation cuts off running work, including compensation."""
    for module in (session, writing):
        changed(stack, module, "shielded", exposed)


def no_shield_of_decisions(stack: ExitStack) -> None:
    """P21: so it does with a decision about what is held."""
    changed(stack, recovery, "shielded", exposed)


def no_other_callbacks(stack: ExitStack) -> None:
    """I8: a callback that fails takes with it those after it."""

    async def run_callbacks(callbacks_: list[Callback], session: str) -> None:
        del session
        due, callbacks_[:] = list(callbacks_), []
        for each in due:
            result = each()
            if inspect.isawaitable(result):
                await result

    changed(stack, callbacks, "run_callbacks", run_callbacks)


def no_second_undo(stack: ExitStack) -> None:
    """P9: an undo that is cut off counts as undone."""
    original = callbacks.Aftermath.leave

    def leave(self: callbacks.Aftermath) -> list[str]:
        notes = original(self)
        del self._callbacks.undos[-1:]
        return notes

    changed(stack, callbacks.Aftermath, "leave", leave)


def no_ambiguous_refusals(stack: ExitStack) -> None:
    """P19: what was sent twice and then refused counts as without effect."""
    never = property(lambda _: False, lambda *_: None)
    stack.enter_context(mock.patch.object(AccessDeniedException, "ambiguous", never, create=True))


def all_ambiguous(stack: ExitStack) -> None:
    """P20: what was refused may still take effect."""
    always = property(lambda _: True, lambda *_: None)
    stack.enter_context(mock.patch.object(AccessDeniedException, "ambiguous", always, create=True))


def no_release_of_others(stack: ExitStack) -> None:
    """P9: a step that fails keeps all keys of its transaction."""
    original = InMemoryBackend.settle

    async def settle_(self: Any, token: TransactionToken, settlement: Settlement) -> None:
        if settlement.keys is None:
            await original(self, token, settlement)

    changed(stack, InMemoryBackend, "settle", settle_)


def no_split_batches(stack: ExitStack) -> None:
    """P9: a batch of deletions that is refused as a whole fails as a whole."""
    changed(stack, finish, "_may_be_about_one", lambda _: False)


def no_copy_over_nothing(stack: ExitStack) -> None:
    """P17: 404 of a conditional copy always means that the source is gone."""
    changed(stack, finish, "NoSuchKeyException", NoSuchNamespaceException)


def no_catalog_of_garbage(stack: ExitStack) -> None:
    """P27: old staged bytes of another catalog are garbage."""
    changed(stack, Connector, "incoming", frozenset({"neighbour"}))


def no_report(stack: ExitStack) -> None:
    """P26: recover() counts what it tried itself, and nothing else."""

    async def unfinished(_: Any) -> list[str]:
        return []

    changed(stack, recovery, "unfinished", unfinished)


def no_scopes(stack: ExitStack) -> None:
    """P8: a failed call undoes all work of its transaction."""
    original = transaction.Transaction.rewind

    def rewind(self: Any, scope: Any) -> Any:
        self.retract(list(self.writes))
        return original(self, scope)

    changed(stack, transaction.Transaction, "rewind", rewind)


def no_compensation_journaled(stack: ExitStack) -> None:
    """P33: the step comes before its compensation is in the journal."""

    async def add_jobs(*_: Any) -> None:
        """Forget it."""

    changed(stack, InMemoryBackend, "add_jobs", add_jobs)


def no_decision_awaited(stack: ExitStack) -> None:
    """P34: compensations are due though nothing is decided."""
    changed(stack, InMemoryBackend, "_is_due", lambda *_: True)


def no_release(stack: ExitStack) -> None:
    """P34: the compensations of an undone savepoint are void if the transaction commits."""
    changed(stack, transaction.Transaction, "release", lambda *_: None)


def no_release_of_failed_steps(stack: ExitStack) -> None:
    """P34: those of a step that raised are, too."""
    changed(stack, transaction.Transaction, "release_failed", lambda _: None)


def no_removal(stack: ExitStack) -> None:
    """P33: a step that did nothing is undone."""

    async def remove(self: Any, undo: jobs.DurableUndo) -> None:
        self.disown([undo])

    changed(stack, jobs.Jobs, "remove", remove)


def no_second_journaling(stack: ExitStack) -> None:
    """P33: what a step does after others have undone it stays."""

    async def journal_again(*_: Any) -> None:
        """Leave it to the call that came before the step."""

    changed(stack, jobs.Jobs, "journal_again", journal_again)


def no_order_of_compensations(stack: ExitStack) -> None:
    """P34: they are called in any order."""
    changed(stack, Job, "waits_for", lambda *_: False)


def no_lease_of_jobs(stack: ExitStack) -> None:
    """P35: two processes call one."""
    original = InMemoryBackend.claim_jobs

    async def claim_jobs(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken = await original(self, *args, **kwargs)
        for each in taken:
            self._tables.jobs[each.transaction_id, each.number].lease_until = 0.0
        return taken

    changed(stack, InMemoryBackend, "claim_jobs", claim_jobs)


def no_next_attempt(stack: ExitStack) -> None:
    """P35: one that fails is given up."""

    async def keep_job(self: Any, job: Job, *, retry_in: float | None = None, **_: Any) -> bool:
        if retry_in is not None:
            await self.end_jobs([job])
        return True

    changed(stack, InMemoryBackend, "keep_job", keep_job)


def no_hooks_in_the_pivot(stack: ExitStack) -> None:
    """P36: the commit does not write them."""
    original = InMemoryBackend.commit

    async def commit(self: Any, token: TransactionToken, commit: Commit) -> None:
        await original(self, token, replace(commit, jobs=()))

    changed(stack, InMemoryBackend, "commit", commit)


def no_order_of_hooks(stack: ExitStack) -> None:
    """P36: hooks with one key are called in any order."""
    original = InMemoryBackend._waits

    def waits(self: Any, job: Job) -> bool:
        return job.key is None and original(self, job)

    changed(stack, InMemoryBackend, "_waits", waits)


def no_longer_lease_of_held(stack: ExitStack) -> None:
    """P37: what is held is undone with the lease of its process."""
    original = InMemoryBackend.hold

    async def hold(self: Any, token: TransactionToken, commit: Commit, seconds: float) -> None:
        await original(self, token, commit, min(seconds, LEASE))

    changed(stack, InMemoryBackend, "hold", hold)


def no_return_to_held(stack: ExitStack) -> None:
    """P37: what a process dies over before it has decided is undone."""
    changed(stack, recovery.Recovery, "_take_claimed", recovery.Recovery._take_over)


def no_fencing_of_held(stack: ExitStack) -> None:
    """P37: two decide at once."""
    original = InMemoryBackend.take_held

    async def take_held(self: Any, transaction_id: str) -> JournaledTransaction | None:
        found = await original(self, transaction_id)
        if found is None:
            return None
        self._tables.transactions[transaction_id].fence = 0
        return replace(found, token=TransactionToken(transaction_id))

    changed(stack, InMemoryBackend, "take_held", take_held)


def no_time_of_the_store(stack: ExitStack) -> None:
    """L10: commands that append nothing use the machine's clock."""

    async def learn_time(_: Any) -> bool:
        return False

    changed(stack, replica.Replica, "_learn_time", learn_time)


MUTATIONS: Sequence[Mutation] = (
    no_read_back,
    no_lock,
    no_condition_of_compensation,
    no_probe,
    no_fencing,
    no_late_writes,
    no_kept_locks,
    no_check_of_reads,
    no_write_ahead,
    no_end,
    no_shield,
    no_other_callbacks,
    no_second_undo,
    no_ambiguous_refusals,
    all_ambiguous,
    no_release_of_others,
    no_split_batches,
    no_copy_over_nothing,
    no_catalog_of_garbage,
    no_report,
    no_scopes,
    no_compensation_journaled,
    no_decision_awaited,
    no_release,
    no_release_of_failed_steps,
    no_removal,
    no_second_journaling,
    no_order_of_compensations,
    no_lease_of_jobs,
    no_next_attempt,
    no_hooks_in_the_pivot,
    no_order_of_hooks,
    no_longer_lease_of_held,
    no_return_to_held,
    no_fencing_of_held,
    no_shield_of_decisions,
    no_time_of_the_store,
)


@contextmanager
def mutated(mutation: Mutation) -> Generator[None]:
    with ExitStack() as stack:
        mutation(stack)
        yield


@pytest.mark.once
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.__name__)
def test_a_walk_finds_what_is_switched_off(mutation: Mutation) -> None:
    directed = DIRECTED.get(mutation.__name__)
    first = int(os.environ["FENNFLOW_SEED"]) * WALKS
    with mutated(mutation):
        for seed in range(first, first + (WALKS if directed is None else 1)):
            try:
                if directed is not None:
                    directed()
                else:
                    walk(seed, **NARROW.get(mutation.__name__, {}))
            except Exception:  # noqa: BLE001 - whatever is not as it must be
                return
    pytest.fail(f"No walk notices: {mutation.__doc__}")


@pytest.mark.once
@pytest.mark.parametrize("schedule", DIRECTED.values(), ids=lambda each: each.__name__)
def test_a_schedule_finds_nothing_where_nothing_is_switched_off(
    schedule: Callable[[], None],
) -> None:
    schedule()
