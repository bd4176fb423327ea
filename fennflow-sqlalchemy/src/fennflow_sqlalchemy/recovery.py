"""Recovery's half of the contract: tombstones, leases, claims, and what is purged in time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from fennflow.backends import (
    Backend,
    Guarantees,
    Intent,
    JournaledSession,
    Outcome,
    SessionToken,
    Tombstone,
)
from fennflow_sqlalchemy.database import ImpatientError
from fennflow_sqlalchemy.engines import open_databases
from fennflow_sqlalchemy.rows import (
    dumps,
    id_rows,
    intent_of,
    key_rows,
    tombstone_of,
    tombstone_rows,
)
from fennflow_sqlalchemy.statements import (
    CatalogStatements,
    NoteStatements,
    SessionStatements,
    TombstoneStatements,
)
from fennflow_sqlalchemy.tables import make_tables

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from fennflow.backends import ObjectKey
    from fennflow_sqlalchemy.config import SqlalchemyBackendConfig

PURGE_PATIENCE = 0.05
"""Seconds to wait for the catalog's file on SQLite, which a user's transaction may hold for long."""


class RecoverableBackend(Backend):
    """What recovery asks of a catalog and a journal in a database.

    Args:
        config: which one.
        doubt_period: seconds for which tombstones and kept locks stand.
        lease_ttl: seconds that a lease runs.
        lock_timeout: seconds to wait for locks that users' transactions hold.
    """

    def __init__(
        self,
        config: SqlalchemyBackendConfig,
        *,
        doubt_period: float,
        lease_ttl: float,
        lock_timeout: float,
    ) -> None:
        self._config = config
        self._tables = make_tables(config.table_prefix, config.schema_name)[1]
        self._catalog, self._journal = open_databases(
            config, lease_ttl=lease_ttl, lock_timeout=lock_timeout
        )
        self._together = self._catalog is self._journal
        self._of_catalog = CatalogStatements(self._tables, self._catalog, doubt_period=doubt_period)
        self._of_session = SessionStatements(
            self._tables,
            self._journal,
            together=self._together,
            lease_ttl=lease_ttl,
            doubt_period=doubt_period,
        )
        self._of_tombstones = TombstoneStatements(
            self._tables, self._journal, doubt_period=doubt_period
        )
        self._of_notes = NoteStatements(self._tables, self._journal)
        self._catalog_id = ""
        self._purge_every = doubt_period / 2
        self._purge_due = 0.0

    @property
    @override
    def catalog_id(self) -> str:
        return self._catalog_id

    @property
    @override
    def guarantees(self) -> Guarantees:
        return Guarantees(shared="network" if self._together else "machine", durable=True)

    @override
    async def aclose(self) -> None:
        await self._catalog.aclose()
        if not self._together:
            await self._journal.aclose()

    # --- what was probed ----------------------------------------------------------------------

    @override
    async def recall(self, name: str) -> str | None:
        def work(connection: Connection) -> str | None:
            kept = connection.scalar(self._of_notes.recall, {"noted": name})
            return None if kept is None else str(kept).partition(" ")[2]

        return await self._journal.run(work, write=False)

    @override
    async def remember(self, name: str, value: str) -> None:
        def work(connection: Connection) -> None:
            connection.execute(self._of_notes.remember, {"noted": name, "text": value})

        # In the journal's file: the catalog's may be locked by a user's transaction.
        await self._journal.run(work)

    # --- tombstones --------------------------------------------------------------------------

    async def _dig(self, tombstones: Collection[Tombstone]) -> None:
        def work(connection: Connection) -> None:
            connection.execute(self._of_tombstones.dig, {"rows": tombstone_rows(tombstones)})

        await self._journal.run(work)

    @override
    async def tombstones(self, keys: Collection[ObjectKey]) -> Collection[Tombstone]:
        def work(connection: Connection) -> list[Tombstone]:
            rows = connection.execute(self._of_tombstones.tombstones, {"rows": key_rows(keys)})
            return [tombstone_of(row) for row in rows]

        return await self._journal.run(work, write=False)

    @override
    async def due_tombstones(self, *, after: Tombstone | None, limit: int) -> Sequence[Tombstone]:
        parameters = {
            "after_namespace": "" if after is None else after.namespace,
            "after_key": "" if after is None else after.key,
            "after_session_id": "" if after is None else after.session_id,
            "after_seq": 0 if after is None else after.seq,
            "limit": limit,
        }

        def work(connection: Connection) -> list[Tombstone]:
            rows = connection.execute(self._of_tombstones.due_tombstones, parameters)
            return [tombstone_of(row) for row in rows]

        return await self._journal.run(work, write=False)

    # --- leases and recovery -----------------------------------------------------------------

    @override
    async def heartbeat(self, sessions: Collection[SessionToken]) -> Collection[SessionToken]:
        def work(connection: Connection) -> list[SessionToken]:
            rows = dumps(session._asdict() for session in sorted(sessions))
            kept = connection.execute(self._of_session.beat, {"rows": rows})
            return [SessionToken(*row) for row in kept]

        return await self._journal.run(work)

    @override
    async def claim(self, limit: int) -> Sequence[JournaledSession]:
        await self._purge()

        def work(connection: Connection) -> list[JournaledSession]:
            rows = connection.execute(self._of_session.claim, {"limit": limit}).all()
            return self._journaled(connection, rows)

        return await self._with_outcomes(await self._journal.run(work))

    @override
    async def sessions(self, *, after: str, limit: int) -> Sequence[JournaledSession]:
        def work(connection: Connection) -> list[JournaledSession]:
            parameters = {"after": after, "limit": limit}
            rows = connection.execute(self._of_session.sessions, parameters).all()
            return self._journaled(connection, rows)

        return await self._with_outcomes(await self._journal.run(work, write=False))

    def _journaled(self, connection: Connection, rows: Sequence[Any]) -> list[JournaledSession]:
        if not rows:
            return []
        intents: dict[str, list[Intent]] = {row.session_id: [] for row in rows}
        for row in connection.execute(self._of_session.intents, {"rows": id_rows(intents)}):
            intents[row.session_id].append(intent_of(row))
        return [
            JournaledSession(
                session=SessionToken(row.session_id, row.token),
                outcome=None,
                age=row.age,
                lease_left=row.lease_left,
                intents=intents[row.session_id],
            )
            for row in rows
        ]

    async def _with_outcomes(
        self, sessions: Sequence[JournaledSession]
    ) -> Sequence[JournaledSession]:
        """Add how sessions were decided, as it stands after they were claimed."""
        if not sessions:
            return sessions
        ids = id_rows(each.session.session_id for each in sessions)

        def work(connection: Connection) -> dict[str, Outcome]:
            rows = connection.execute(self._of_catalog.outcomes, {"rows": ids})
            return {row.session_id: Outcome(row.outcome) for row in rows}

        outcomes = await self._catalog.run(work, write=False)
        return [replace(each, outcome=outcomes.get(each.session.session_id)) for each in sessions]

    @override
    async def known(self, session_ids: Collection[str]) -> Collection[str]:
        if not session_ids:
            return []
        parameters = {"rows": id_rows(session_ids)}

        def journaled(connection: Connection) -> set[str]:
            return set(connection.execute(self._of_session.known, parameters).scalars())

        def staged(connection: Connection) -> set[str]:
            return set(connection.execute(self._of_catalog.staged_sessions, parameters).scalars())

        # What was lost of the journal must not cost the bytes that records still point at.
        found = await self._journal.run(journaled, write=False)
        return found | await self._catalog.run(staged, write=False)

    async def _purge(self) -> None:
        """Forget kept locks that ran out, and outcomes that outlived their sessions (P5).

        An outcome is marked when its session is seen to be gone, and goes a doubt period later.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._purge_due:
            return
        self._purge_due = loop.time() + self._purge_every

        def locks(connection: Connection) -> None:
            connection.execute(self._of_session.drop_kept_locks)

        def outcomes(connection: Connection) -> None:
            connection.execute(self._of_catalog.purge_outcomes)

        last = ""
        try:
            await self._journal.run(locks, patience=PURGE_PATIENCE)
            while old := await self._old_outcomes(last):
                last = old[-1]
                await self._mark_settled(old)
            await self._catalog.run(outcomes, patience=PURGE_PATIENCE)
        except ImpatientError:
            return  # another transaction holds a lock: what is old can become older

    async def _old_outcomes(self, after: str) -> list[str]:
        def work(connection: Connection) -> list[str]:
            found = connection.execute(self._of_catalog.old_outcomes, {"after": after})
            return list(found.scalars())

        return await self._catalog.run(work, write=False)

    async def _mark_settled(self, session_ids: Sequence[str]) -> None:
        def known(connection: Connection) -> set[str]:
            found = connection.execute(self._of_session.known, {"rows": id_rows(session_ids)})
            return set(found.scalars())

        alive = await self._journal.run(known, write=False)
        gone = id_rows(each for each in session_ids if each not in alive)

        def mark(connection: Connection) -> None:
            connection.execute(self._of_catalog.settle_outcomes, {"rows": gone})

        await self._catalog.run(mark, patience=PURGE_PATIENCE)
