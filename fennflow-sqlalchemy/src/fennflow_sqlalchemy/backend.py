"""Catalog and journal in SQLite or PostgreSQL: the contract of `Backend`, on SQLAlchemy Core.

Every method is one transaction on PostgreSQL. On SQLite, where journal and catalog are two files,
those that touch both are one on each, in an order by which a crash between the two leaves what
recovery brings to its end: the insert of the outcome, in the catalog's, decides alone (P5).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import uuid_utils
from sqlalchemy import text
from typing_extensions import override

from fennflow.backends import (
    Commit,
    JoinedTransaction,
    ObjectKey,
    Outcome,
    Plan,
    Record,
    SessionToken,
    Step,
    Tombstone,
    conflict,
    dump_steps,
    load_steps,
)
from fennflow.exceptions import (
    CommitUncertainException,
    ConfigException,
    RecordLockedException,
    SessionLostException,
)
from fennflow.paths import after_prefix
from fennflow_sqlalchemy.database import ImpatientError, create_tables
from fennflow_sqlalchemy.join import UserTransaction
from fennflow_sqlalchemy.recovery import RecoverableBackend
from fennflow_sqlalchemy.rows import (
    intent_rows,
    key_rows,
    of,
    record_of,
    record_rows,
    tombstone_rows,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


PATIENCE = 5.0
"""Seconds to wait for one's own pivot, of which only the answer was lost."""


class SqlalchemyBackend(RecoverableBackend):
    """Catalog and journal in a database.

    Args:
        config: which one.
        doubt_period: seconds for which tombstones and kept locks stand.
        lease_ttl: seconds that a lease runs.
    """

    @override
    async def open(self) -> None:
        tables, create = self._tables, self._config.create_tables
        if self._together:
            everything = [*tables.catalog, *tables.journal]
            self._catalog_id = await create_tables(
                self._catalog, everything, str(uuid_utils.uuid7()), create=create
            )
            return
        self._catalog_id = await create_tables(
            self._catalog, tables.catalog, str(uuid_utils.uuid7()), create=create
        )
        of_journal = await create_tables(
            self._journal, tables.journal, self._catalog_id, create=create
        )
        if of_journal != self._catalog_id:
            message = (
                f"The journal {self._journal.name} belongs to another catalog than "
                f"{self._catalog.name}. Restore the two files together, or name the right one "
                "with SqlalchemyBackendConfig(journal=...)."
            )
            raise ConfigException(message)

    # --- catalog -----------------------------------------------------------------------------

    @override
    async def records(self, keys: Collection[ObjectKey]) -> Mapping[ObjectKey, Record]:
        if not keys:
            return {}

        async def work(connection: AsyncConnection) -> dict[ObjectKey, Record]:
            return await self._records(connection, keys)

        return await self._catalog.run(work, write=False)

    async def _records(
        self, connection: AsyncConnection, keys: Collection[ObjectKey]
    ) -> dict[ObjectKey, Record]:
        rows = await connection.execute(self._of_catalog.records, {"rows": key_rows(keys)})
        return {record.object_key: record for record in map(record_of, rows)}

    @override
    async def scan(
        self, namespace: str, *, prefix: str, start: str, limit: int
    ) -> Sequence[Record]:
        # No key holds a NUL, which PostgreSQL does not take either: "a\0" is what follows "a".
        start, nul, _ = max(start, prefix).partition("\0")
        stop = after_prefix(prefix)
        statement = self._of_catalog.scan[bool(nul), stop is not None]
        parameters = {"namespace": namespace, "start": start, "limit": limit}
        if stop is not None:
            parameters["stop"] = stop

        async def work(connection: AsyncConnection) -> list[Record]:
            return [record_of(row) for row in await connection.execute(statement, parameters)]

        return await self._catalog.run(work, write=False)

    # --- a session ---------------------------------------------------------------------------

    @override
    async def stage(
        self,
        session: SessionToken,
        keys: Collection[ObjectKey],
        plan: Plan,
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        locking = {"rows": key_rows(keys), "of_session": session.session_id}
        open_it = self._of_session.open_session if begins else self._of_session.renew

        async def work(connection: AsyncConnection) -> Mapping[ObjectKey, Record]:
            opened = await connection.execute(open_it, of(session))
            if opened.first() is None:
                raise _lost(session)
            if keys:
                locked = (await connection.execute(self._of_session.lock, locking)).all()
                if len(locked) < len(set(keys)):
                    holders = await connection.execute(self._of_session.holders, locking)
                    raise _locked(holders.first())
            records = await self._see(connection, session, keys)
            if intents := plan(records):
                rows = intent_rows(session.session_id, intents)
                await connection.execute(self._of_session.write_intents, {"rows": rows})
            return records

        return await self._journal.run(work)

    async def _see(
        self, connection: AsyncConnection, session: SessionToken, keys: Collection[ObjectKey]
    ) -> Mapping[ObjectKey, Record]:
        """Return the records of keys that were just locked, so that nobody changes them."""
        if self._together:
            return await self._records(connection, keys) if keys else {}

        async def work(catalog: AsyncConnection) -> Mapping[ObjectKey, Record]:
            decided = await catalog.execute(self._of_catalog.outcome, of(session))
            if decided.first() is not None:
                raise _lost(session)
            return await self._records(catalog, keys) if keys else {}

        return await self._catalog.run(work, write=False)

    @override
    async def note_upload(self, session: SessionToken, seq: int, upload_id: str) -> None:
        async def work(connection: AsyncConnection) -> None:
            await self._check_token(connection, session)
            parameters = {"of_session": session.session_id, "number": seq, "upload": upload_id}
            await connection.execute(self._of_session.note_upload, parameters)

        await self._journal.run(work)

    @override
    async def commit(self, session: SessionToken, commit: Commit) -> None:
        if commit.tombstones:
            # They name what is garbage if the session aborts, and are spared if it commits.
            await self._dig(commit.tombstones)
        if self._together:

            async def whole(connection: AsyncConnection) -> None:
                await self._check_token(connection, session)
                await self._pivot(connection, session, commit)
                if not commit.steps:
                    await self._drop(connection, session)

            await self._catalog.run(whole, once=True)
            return

        async def pivot(connection: AsyncConnection) -> None:
            await self._pivot(connection, session, commit)

        await self._journal.run(lambda each: self._check_token(each, session), write=False)
        await self._catalog.run(pivot, once=True)
        if not commit.steps:
            await self._journal.run(lambda each: self._drop(each, session))

    @override
    async def join(self, transaction: object) -> JoinedTransaction:
        joined = UserTransaction(transaction, self._catalog, self._tables.meta, self._pivot_joined)
        await joined.check(self._catalog_id)
        return joined

    async def _pivot_joined(
        self, connection: AsyncConnection, session: SessionToken, commit: Commit
    ) -> None:
        """Write the pivot in a user's transaction, which may not see the journal's rows (P5)."""
        if commit.tombstones:
            await self._dig(commit.tombstones)

        # A block without files has no rows of the journal; one with files must have kept them.
        empty = not (commit.records or commit.removed or commit.steps)

        async def check(journal: AsyncConnection) -> None:
            await self._check_token(journal, session, missing_ok=empty)

        await self._journal.run(check, write=False)
        await self._pivot(connection, session, commit, joined=True)

    async def _pivot(
        self,
        connection: AsyncConnection,
        session: SessionToken,
        commit: Commit,
        *,
        joined: bool = False,
    ) -> None:
        """Decide `committed`, and write the records; inserts alone decide (P5)."""
        if commit.reads:
            if self._catalog.dialect == "postgresql":
                # Nobody else's pivot may come between the check and the end of this one.
                records = self._tables.records.fullname
                await connection.execute(text(f"LOCK TABLE {records} IN SHARE ROW EXCLUSIVE MODE"))
            # A user's transaction may have a snapshot from before what others committed since.
            now = await (
                self.records(commit.reads) if joined else self._records(connection, commit.reads)
            )
            changed = [key for key, record in commit.reads.items() if now.get(key) != record]
            if changed:
                raise conflict(changed)
        decision = {
            "of_session": session.session_id,
            "decided": Outcome.COMMITTED.value,
            "apply": dump_steps(commit.steps),
        }
        if (await connection.execute(self._of_catalog.decide, decision)).first() is None:
            raise _lost(session)
        if commit.records:
            rows = record_rows(commit.records)
            await connection.execute(self._of_catalog.upsert_records, {"rows": rows})
        if commit.removed:
            rows = key_rows(commit.removed)
            await connection.execute(self._of_catalog.remove_records, {"rows": rows})

    @override
    async def abort(
        self, session: SessionToken, *, patience: float | None = None
    ) -> tuple[Outcome, Sequence[Step]]:
        async def decide(connection: AsyncConnection) -> tuple[Outcome, Sequence[Step]]:
            if self._together:
                await self._check_token(connection, session, missing_ok=True)
            decision = {
                "of_session": session.session_id,
                "decided": Outcome.ABORTED.value,
                "apply": "[]",
            }
            if (await connection.execute(self._of_catalog.decide, decision)).first() is not None:
                return Outcome.ABORTED, ()
            stands = await connection.execute(self._of_catalog.outcome, of(session))
            outcome, steps = stands.one()
            return Outcome(outcome), load_steps(steps)

        def check(connection: AsyncConnection) -> Any:
            return self._check_token(connection, session, missing_ok=True)

        if patience is None and self._together:
            patience = PATIENCE  # on SQLite the file's own suffices
        try:
            if self._together:
                return await self._catalog.run(decide, patience=patience)
            await self._journal.run(check, write=False)
            decision = await self._catalog.run(decide, patience=patience)
        except ImpatientError as error:
            # A pivot inside a user's transaction may hold the decision for long (P5).
            message = (
                f"Session {session.session_id} waits for a transaction of the database that has "
                "not ended yet."
            )
            raise CommitUncertainException(message) from error
        # Who claimed the session meanwhile did not see this decision: it is theirs to act on.
        await self._journal.run(check, write=False)
        return decision

    @override
    async def relocate(self, session: SessionToken, records: Sequence[Record]) -> None:
        async def work(connection: AsyncConnection) -> None:
            if self._together:
                await self._check_token(connection, session)
            await connection.execute(self._of_catalog.relocate, {"rows": record_rows(records)})

        if not self._together:
            await self._journal.run(lambda each: self._check_token(each, session), write=False)
        await self._catalog.run(work)

    @override
    async def settle(
        self,
        session: SessionToken,
        *,
        tombstones: Collection[Tombstone] = (),
        keep_locked: Collection[ObjectKey] = (),
        buried: Collection[Tombstone] = (),
    ) -> None:
        async def work(connection: AsyncConnection) -> None:
            if not await self._check_token(connection, session, missing_ok=True):
                return
            if buried:
                await connection.execute(
                    self._of_tombstones.fill_in, {"rows": tombstone_rows(buried)}
                )
            if tombstones:
                await connection.execute(
                    self._of_tombstones.dig, {"rows": tombstone_rows(tombstones)}
                )
            if keep_locked:
                kept = {"rows": key_rows(keep_locked), "of_session": session.session_id}
                await connection.execute(self._of_session.keep_locks, kept)
            await self._drop(connection, session)

        await self._journal.run(work)

    async def _drop(self, connection: AsyncConnection, session: SessionToken) -> None:
        for statement in (
            self._of_session.drop_locks,
            self._of_session.drop_intents,
            self._of_session.drop_session,
        ):
            await connection.execute(statement, of(session))

    async def _check_token(
        self, connection: AsyncConnection, session: SessionToken, *, missing_ok: bool = False
    ) -> bool:
        """Return whether the journal has the session, which nobody claims until the end of this.

        Raises:
            SessionLostException: it is somebody else's, or gone and that is not `missing_ok`.
        """
        found = await connection.execute(self._of_session.hold_token, of(session))
        token = found.scalar()
        if token == session.token:
            return True
        if token is None and missing_ok:
            return False
        raise _lost(session)


def _lost(session: SessionToken) -> SessionLostException:
    message = (
        f"Session {session.session_id} is no longer this process's: its lease ran out, or it was "
        "decided otherwise. Nothing of it was committed here; run the unit of work again."
    )
    return SessionLostException(message)


def _locked(holder: Any) -> RecordLockedException:
    name = "A key of this call" if holder is None else f"{holder.namespace}/{holder.key}"
    message = f"{name} is being written by another session."
    return RecordLockedException(message)
