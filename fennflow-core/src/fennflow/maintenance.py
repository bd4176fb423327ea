"""Operations on a whole catalog and its buckets: recovery, reconciliation, diagnosis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from fennflow import plugins
from fennflow.backends.values import check_cursor
from fennflow.config import ReconcileConfig
from fennflow.engine.plan import held_changes
from fennflow.engine.runtime import engine_for
from fennflow.exceptions import ConfigException
from fennflow.paths import StoragePath
from fennflow.printable import brief
from fennflow.reports import (
    Change,
    CommitInfo,
    CommittedFile,
    DeletedFile,
    Diagnosis,
    Finding,
    ReconcileReport,
    RecoveryReport,
    TransactionInfo,
)
from fennflow.repositories.fields import areas_of, namespaces_of

if TYPE_CHECKING:
    from fennflow.backends import Backend, CommittedTransaction, JournaledTransaction
    from fennflow.config import ConfigDict

TRANSACTIONS_AT_ONCE = 1000
COMMITS_AT_ONCE = 100

ReconcileStrategy = Literal["fill_if_empty", "insert_missing", "replace"]
ReconcileOrphans = Literal["report", "adopt", "delete"]


class Maintenance:
    """The class methods of a `UnitOfWork` that concern all of its buckets, and no transaction."""

    config: ClassVar[ConfigDict]

    @classmethod
    async def reconcile(
        cls,
        *,
        strategy: ReconcileStrategy | None = None,
        orphans: ReconcileOrphans | None = None,
        adopt_catalogs: Sequence[str] | None = None,
        batch_size: int | None = None,
        on_finding: Callable[[Finding], object] | None = None,
        on_progress: Callable[[ReconcileReport], object] | None = None,
    ) -> Mapping[str, ReconcileReport]:
        """Compare the catalog with the buckets of all repositories, and correct differences.

        If the catalog has no record of a bucket, the whole bucket is recorded. If that is
        interrupted, the next attempt continues it, in this process or another one.

        Args:
            strategy: like that of `ReconcileConfig`; by default the one in `config.reconcile`.
            orphans: the same.
            adopt_catalogs: the same.
            batch_size: the same.
            on_finding: plain or async, called for every difference, after what was done about it is durable.
            on_progress: plain or async, called from time to time with the progress in a bucket.

        Returns:
            for each bucket, or bucket and prefix, how it differed and what was done.

        Raises:
            ReconcileFailedException: a temporary file cannot be written, which a store that lists
                in no order needs.
            BaseConnectorException: the store refused or cannot be reached.

        Example:
            ```python
            import asyncio

            from fennflow import UnitOfWork
            from fennflow.repositories import CrudRepository, RepoField


            class UOW(UnitOfWork):
                inbox = RepoField(CrudRepository, namespace="inbox")


            async def main():
                reports = await UOW.reconcile(strategy="insert_missing", orphans="adopt")
                print(reports["inbox"].objects, dict(reports["inbox"].differences))
                #> 0 {}


            asyncio.run(main())
            ```
        """
        changes: dict[str, Any] = {
            "strategy": strategy,
            "orphans": orphans,
            "adopt_catalogs": adopt_catalogs,
            "batch_size": batch_size,
        }
        settings = ReconcileConfig(
            **{
                **cls.config.reconcile.model_dump(),
                **{name: value for name, value in changes.items() if value is not None},
            }
        )
        async with engine_for(cls.config, plugins.registry()) as engine:
            return {
                str(area): await engine.reconciler.reconcile(
                    area, settings, on_finding=on_finding, on_progress=on_progress
                )
                for area in areas_of(cls)
            }

    @classmethod
    async def recover(cls) -> RecoveryReport:
        """Finish or roll back the transactions of crashed processes, and clean up their leftovers.

        This also happens automatically: when units of work of a configuration are first used, and
        every `recovery_interval`. Call it if nothing else runs, or if you cannot wait. A
        transaction is taken over when its lease has run out, `lease_ttl` after the last heartbeat.

        Returns:
            what was done. The next recovery tries again what is `pending`, and the `problems` that
            the store refused or that it could not reach. It also calls compensations and hooks that
            failed. Calls whose function this process has not registered are named, and left to a
            process that has.

        Raises:
            BaseBackendException: the catalog cannot be reached.

        Example:
            ```python
            import asyncio

            from fennflow import UnitOfWork
            from fennflow.repositories import CrudRepository, RepoField


            class UOW(UnitOfWork):
                inbox = RepoField(CrudRepository, namespace="inbox")


            async def main():
                report = await UOW.recover()
                print(report.rolled_forward, report.compensated)
                #> 0 0


            asyncio.run(main())
            ```
        """
        async with engine_for(cls.config, plugins.registry()) as engine:
            return await engine.recovery.run(namespaces_of(cls))

    @classmethod
    async def transactions(cls) -> Sequence[TransactionInfo]:
        """Return the transactions that are open, held, or wait to be finished, oldest first."""
        found: list[TransactionInfo] = []
        last = ""
        async with engine_for(cls.config, plugins.registry()) as engine:
            while page := await engine.backend.transactions(after=last, limit=TRANSACTIONS_AT_ONCE):
                last = page[-1].token.transaction_id
                found += [await _info_of(engine.backend, each) for each in page]
        return found

    @classmethod
    def commits(
        cls, *, after: str | None = None, poll: float | None = None
    ) -> AsyncIterator[CommitInfo]:
        """Iterate over what was committed, by any process: each commit once, in order.

        Of two commits that changed the same path, the later one comes later. What was rolled back
        does not appear. Store the cursor of a commit when you have processed it, and pass it later.
        The feed covers the whole catalog, not only the repositories of this class.

        Args:
            after: the cursor of a commit, or from `commit_cursor()`, after which to begin; by
                default the iteration begins with the first commit that is kept.
            poll: seconds between checks for new commits, without end; by default the iteration ends
                with the last commit.

        Returns:
            an iterator, which sends the first request when it is used.

        Raises:
            CursorException: some commits after the cursor were removed (`commit_retention`), or it
                is from another catalog; or it is not a cursor at all, which the call itself raises.
            ConfigException: the backend keeps no commits, or `poll` is not a positive number.
            BaseBackendException: the catalog cannot be reached. Continue with the last cursor.

        Example:
            ```python
            import asyncio

            from fennflow import UnitOfWork
            from fennflow.files import TextContent
            from fennflow.repositories import CrudRepository, RepoField


            class UOW(UnitOfWork):
                letters = RepoField(CrudRepository, namespace="letters")


            async def main():
                cursor = await UOW.commit_cursor()
                async with UOW() as uow:
                    await uow.letters.put(TextContent.from_content("Dear Ann", filename="1.txt"))
                async for commit in UOW.commits(after=cursor):
                    print([file.path for file in commit.records], commit.deletions)
                    #> ['1.txt'] []


            asyncio.run(main())
            ```
        """
        given = cast("tuple[object, object]", (after, poll))
        if not isinstance(given[0], str | None):
            message = f"after={brief(given[0])} is not a cursor, which is a str."
            raise ConfigException(message)
        if after is not None:
            check_cursor(after)
        if given[1] is not None and not (isinstance(given[1], (int, float)) and given[1] > 0):
            message = f"poll={brief(given[1])} is not a number of seconds above 0."
            raise ConfigException(message)
        return _commits(cls.config, after, poll)

    @classmethod
    async def commit_cursor(cls) -> str:
        """Return the cursor of the end of `commits()`: commits from now on come after it.

        Raises:
            ConfigException: the backend keeps no commits.
            BaseBackendException: the catalog cannot be reached.
        """
        async with engine_for(cls.config, plugins.registry()) as engine:
            return await engine.backend.commit_cursor()

    @classmethod
    async def commit_held(cls, transaction_id: str) -> None:
        """Commit a transaction that a unit of work left with `hold()`, in any process.

        Args:
            transaction_id: what `hold()` returned.

        Raises:
            TransactionException: it is not held, or not any more.
            ConflictException: `validate_reads`, and a record that it read has changed. It is undone.
            CommitUncertainException: the outcome is unknown; `transactions()` shows it later.
        """
        checked = _checked_id(transaction_id)
        async with engine_for(cls.config, plugins.registry()) as engine:
            await engine.recovery.commit_held(checked)

    @classmethod
    async def abort_held(cls, transaction_id: str) -> None:
        """Undo a transaction that a unit of work left with `hold()`, in any process.

        Args:
            transaction_id: what `hold()` returned.

        Raises:
            TransactionException: it is not held, or not any more.
        """
        checked = _checked_id(transaction_id)
        async with engine_for(cls.config, plugins.registry()) as engine:
            await engine.recovery.abort_held(checked)

    @classmethod
    async def diagnose(cls) -> Diagnosis:
        """Connect to the backend and every bucket, test what they enforce, and report the result.

        Writes a few small objects under the reserved prefix, and removes them.

        Example:
            ```python
            import asyncio

            from fennflow import UnitOfWork
            from fennflow.repositories import CrudRepository, RepoField


            class UOW(UnitOfWork):
                inbox = RepoField(CrudRepository, namespace="inbox")


            async def main():
                diagnosis = await UOW.diagnose()
                print(diagnosis.problems, diagnosis.namespaces["inbox"].keeps_stamps)
                #> () True


            asyncio.run(main())
            ```
        """
        from fennflow.engine.diagnosis import diagnose

        async with engine_for(cls.config, plugins.registry()) as engine:
            return await diagnose(engine, areas_of(cls), engine.recovery.jobs)


def _checked_id(transaction_id: object) -> str:
    if not isinstance(transaction_id, str):
        message = (
            f"{brief(transaction_id)} is not an id of a transaction, which is a str: see hold()."
        )
        raise ConfigException(message)
    return transaction_id


async def _commits(
    config: ConfigDict, after: str | None, poll: float | None
) -> AsyncGenerator[CommitInfo]:
    while True:
        # The engine is not held open while the caller works: the caller may stop iterating.
        async with engine_for(config, plugins.registry()) as engine:
            page = await engine.backend.commits(after=after, limit=COMMITS_AT_ONCE)
        for each in page:
            after = each.cursor
            yield _commit_of(each)
        if page:
            continue
        if poll is None:
            return
        await asyncio.sleep(poll)


def _commit_of(found: CommittedTransaction) -> CommitInfo:
    return CommitInfo(
        cursor=found.cursor,
        transaction_id=found.transaction_id,
        committed_at=found.committed_at,
        records=[
            CommittedFile(
                namespace=each.namespace,
                path=StoragePath(each.key),
                size=each.size,
                media_type=each.media_type,
                sha256=each.sha256,
                created_at=each.created_at,
                modified_at=each.modified_at,
                metadata=each.metadata,
                headers=each.headers,
            )
            for each in found.records
        ],
        deletions=[
            DeletedFile(namespace=each.namespace, path=StoragePath(each.key))
            for each in sorted(found.removed)
        ],
    )


async def _info_of(backend: Backend, found: JournaledTransaction) -> TransactionInfo:
    state: Literal["open", "held", "committed", "aborted"]
    state = "open" if found.outcome is None else found.outcome.value
    changes: Sequence[Change] = ()
    if found.is_held and found.held is not None:
        keys = {*found.held.removed, *(each.object_key for each in found.held.records)}
        state, changes = "held", held_changes(found.held, await backend.records(keys))
    return TransactionInfo(
        transaction_id=found.token.transaction_id,
        state=state,
        age=found.age,
        lease_left=found.lease_left,
        paths=[f"{intent.namespace}/{intent.key}" for intent in found.intents],
        changes=changes,
        process=found.process,
    )
