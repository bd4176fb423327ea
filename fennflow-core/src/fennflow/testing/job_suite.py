"""The tests of compensations and hooks in `BackendSuite`; skipped for backends without them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace

import pytest

from fennflow.backends import Backend, Commit, Job, Outcome, TransactionToken
from fennflow.config import BackendConfig
from fennflow.testing.backend_values import (
    A,
    new_transaction,
    plan_for,
    record,
    run,
)

NAMES = ("undo", "hook")


def job(
    transaction: TransactionToken,
    number: int = 1,
    after: Outcome | None = Outcome.ABORTED,
    key: str | None = None,
) -> Job:
    """Return a compensation, or a hook."""
    return Job(
        transaction_id=transaction.transaction_id,
        number=number,
        name="hook" if after is Outcome.COMMITTED else "undo",
        arguments='{"schlüssel":1}',
        after=after,
        key=key,
    )


async def stepped(backend: Backend, *numbers: int) -> TransactionToken:
    """Begin a transaction, and journal compensations for it."""
    transaction = new_transaction()
    await backend.begin_writes(transaction, (), lambda _: ())
    for number in numbers:
        await backend.add_jobs([job(transaction, number)])
    return transaction


async def take(backend: Backend, names: Collection[str] = NAMES) -> Sequence[tuple[str, int]]:
    """Claim the jobs that are due."""
    found = await backend.claim_jobs(names, limit=100)
    return [(each.transaction_id, each.number) for each in found]


def with_jobs(
    config: BackendConfig, scenario: Callable[[Backend], Awaitable[None]], lease_ttl: float = 60.0
) -> None:
    """Run a scenario on a backend, if it keeps jobs."""

    async def checked(backend: Backend) -> None:
        if not backend.keeps_jobs:
            pytest.skip("The backend keeps no jobs.")
        await scenario(backend)

    run(config, checked, lease_ttl=lease_ttl)


class JobSuite:
    """Tests of compensations and hooks, and of their calls (P33 to P36)."""

    def test_a_job_comes_back_as_it_was_journaled(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1)
            hook = job(transaction, 2, Outcome.COMMITTED, key="a key")
            found = await backend.jobs(limit=9, transaction_id=transaction.transaction_id)
            assert found == [job(transaction)]
            await backend.commit(transaction, Commit(jobs=[hook]))
            [claimed] = await backend.claim_jobs(NAMES, limit=9)
            assert claimed == replace(hook, attempts=1)
            assert await backend.keep_job(claimed, retry_in=0.0, error="nein")
            assert await backend.jobs(limit=9) == [replace(hook, attempts=1, error="nein")]

        with_jobs(config, scenario)

    def test_a_compensation_is_due_if_its_transaction_is_decided_aborted(
        self, config: BackendConfig
    ) -> None:
        """P34."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1)
            assert (await take(backend), await backend.jobs(limit=9)) == ([], [])
            await backend.abort(transaction)
            assert await take(backend) == [(transaction.transaction_id, 1)]

        with_jobs(config, scenario)

    def test_a_compensation_outlives_the_rows_of_its_transaction(
        self, config: BackendConfig
    ) -> None:
        """P34."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1)
            await backend.abort(transaction)
            await backend.settle(transaction)
            assert await take(backend) == [(transaction.transaction_id, 1)]

        with_jobs(config, scenario)

    def test_a_compensation_of_a_commit_is_never_due(self, config: BackendConfig) -> None:
        """P34: neither immediately, nor when all other rows of the transaction are removed."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1)
            await backend.commit(transaction, Commit())
            for _ in range(3):
                assert (await take(backend), await backend.jobs(limit=9)) == ([], [])
                await backend.claim(10)

        with_jobs(config, scenario)

    def test_compensations_are_taken_last_step_first(self, config: BackendConfig) -> None:
        """P34."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1, 2)
            other = await stepped(backend, 1)
            await backend.abort(transaction)
            await backend.abort(other)
            taken = await backend.claim_jobs(NAMES, limit=9)
            assert {(each.transaction_id, each.number) for each in taken} == {
                (transaction.transaction_id, 2),
                (other.transaction_id, 1),
            }
            await backend.end_jobs(taken)
            assert await take(backend) == [(transaction.transaction_id, 1)]

        with_jobs(config, scenario)

    def test_a_compensation_that_keeps_failing_holds_up_no_other(
        self, config: BackendConfig
    ) -> None:
        """P34."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1, 2)
            await backend.abort(transaction)
            for attempt in (1, 2, 3):
                [claimed] = await backend.claim_jobs(NAMES, limit=9)
                assert (claimed.number, claimed.attempts) == (2, attempt)
                await backend.keep_job(claimed, retry_in=0.0 if attempt < 3 else 60.0, error="no")
            assert await take(backend) == [(transaction.transaction_id, 1)]

        with_jobs(config, scenario)

    def test_a_savepoint_that_is_undone_makes_its_compensations_due(
        self, config: BackendConfig
    ) -> None:
        """P34: they are called even if the transaction commits."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1, 2, 3)
            await backend.add_jobs([job(transaction, 2, None)])
            assert await take(backend) == [(transaction.transaction_id, 2)]
            await backend.commit(transaction, Commit())
            assert len(await backend.jobs(limit=9)) == 1

        with_jobs(config, scenario)

    def test_a_compensation_that_is_journaled_again_is_called_again(
        self, config: BackendConfig
    ) -> None:
        """P33: the step ended after the lease had run out, and the first call may have come before it."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1)
            await backend.abort(transaction)
            [first] = await backend.claim_jobs(NAMES, limit=9)
            await backend.add_jobs([job(transaction, 1, None)])
            await backend.end_jobs([first])
            assert not await backend.keep_job(first)
            assert await take(backend) == [(transaction.transaction_id, 1)]

        with_jobs(config, scenario)

    def test_hooks_are_journaled_by_the_commit_alone(self, config: BackendConfig) -> None:
        """P36, P4."""

        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A], plan_for(A))
            hook = job(transaction, 1, Outcome.COMMITTED)
            assert await take(backend) == []
            await backend.commit(transaction, Commit(records=[record(A, transaction)], jobs=[hook]))
            assert await take(backend) == [(transaction.transaction_id, 1)]
            assert set(await backend.records([A])) == {A}

        with_jobs(config, scenario)

    def test_hooks_with_one_key_are_taken_in_the_order_of_their_commits(
        self, config: BackendConfig
    ) -> None:
        """P36."""

        async def scenario(backend: Backend) -> None:
            first, second = await stepped(backend), await stepped(backend)
            for each in (second, first):
                hooks = [
                    job(each, number, Outcome.COMMITTED, key)
                    for number, key in enumerate(("k", "k", None, "other"), 1)
                ]
                await backend.commit(each, Commit(jobs=hooks))
            order: list[tuple[str, int]] = []
            while taken := await backend.claim_jobs(NAMES, limit=100):
                order += [(each.transaction_id, each.number) for each in taken if each.key == "k"]
                assert len({each.key for each in taken if each.key}) == len(
                    [each for each in taken if each.key]
                )
                await backend.end_jobs(taken)
            assert order == [
                (each.transaction_id, number) for each in (second, first) for number in (1, 2)
            ]

        with_jobs(config, scenario)

    def test_a_job_without_a_function_here_is_left_alone(self, config: BackendConfig) -> None:
        """P35: so are jobs that wait for it."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1)
            await backend.add_jobs([replace(job(transaction, 2), name="elsewhere")])
            await backend.abort(transaction)
            assert await take(backend) == []
            assert len(await backend.jobs(limit=9)) == 2
            assert await take(backend, ["elsewhere"]) == [(transaction.transaction_id, 2)]

        with_jobs(config, scenario)

    def test_of_racing_processes_one_takes_a_job(self, config: BackendConfig) -> None:
        """P35."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1)
            await backend.commit(transaction, Commit(jobs=[job(transaction, 2, Outcome.COMMITTED)]))
            async with asyncio.TaskGroup() as group:
                racing = [group.create_task(take(backend)) for _ in range(8)]
            assert sorted(len(each.result()) for each in racing) == [0] * 7 + [1]

        with_jobs(config, scenario)

    def test_a_job_whose_process_died_is_taken_when_its_lease_has_run_out(
        self, config: BackendConfig
    ) -> None:
        """P35: its former process can neither keep nor end it."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1)
            await backend.abort(transaction)
            [first] = await backend.claim_jobs(NAMES, limit=9)
            second: Sequence[Job] = ()
            while not second:
                second = await backend.claim_jobs(NAMES, limit=9)
            assert [each.attempts for each in second] == [2]
            assert not await backend.keep_job(first)
            await backend.end_jobs([first])
            assert len(await backend.jobs(limit=9)) == 1

        with_jobs(config, scenario, lease_ttl=0.05)

    def test_a_job_that_failed_is_due_later_or_if_it_is_in_a_hurry(
        self, config: BackendConfig
    ) -> None:
        """P35."""

        async def scenario(backend: Backend) -> None:
            transaction = await stepped(backend, 1)
            other = await stepped(backend, 1)
            await backend.abort(transaction)
            [claimed] = await backend.claim_jobs(NAMES, limit=9)
            assert await backend.keep_job(claimed)
            assert await backend.claim_jobs(NAMES, limit=9, hurry=True) == []
            assert await backend.keep_job(claimed, retry_in=600.0)
            assert await take(backend) == []
            for which, found in ((other, 0), (transaction, 1)):
                jobs = await backend.claim_jobs(
                    NAMES, limit=9, hurry=True, transaction_id=which.transaction_id
                )
                assert len(jobs) == found

        with_jobs(config, scenario)
