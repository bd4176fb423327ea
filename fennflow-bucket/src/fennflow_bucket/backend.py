"""Catalog and journal in the bucket: the contract of `Backend`, on a replica of the log."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from hashlib import sha256
from typing import TYPE_CHECKING

import uuid_utils
from typing_extensions import override

from fennflow import plugins
from fennflow.backends import (
    FINISHED,
    Area,
    Backend,
    Commit,
    CommittedTransaction,
    Decision,
    Fill,
    FillPart,
    Guarantees,
    Job,
    JournaledTransaction,
    LateWrite,
    ObjectKey,
    Outcome,
    Plan,
    Record,
    Settlement,
    TransactionToken,
    dump_commit,
    dump_steps,
    load_commit,
    process_name,
)
from fennflow.backends.values import ATTEMPTS_IN_ORDER
from fennflow_bucket import feed
from fennflow_bucket.cache import state_file
from fennflow_bucket.clocks import SECOND
from fennflow_bucket.commands import Command, names_from, records_at, records_from
from fennflow_bucket.following import Limits
from fennflow_bucket.jobs import has_jobs, job_of, job_row, jobs_in
from fennflow_bucket.log import Log
from fennflow_bucket.replica import Replica
from fennflow_bucket.rows import (
    intent_of,
    key_rows,
    late_of,
    late_row,
    record_row,
)

if TYPE_CHECKING:
    from sqlite3 import Connection

    from fennflow.config import ConfigDict
    from fennflow.connectors import Connector
    from fennflow_bucket.config import BucketBackendConfig

DAY = 86400 * SECOND
MIN_RETENTION = 1800.0
MAX_TRUST = 300.0
_ROW = "transaction_id, token, began_at, lease_until, outcome, held, held_until, process"


def new_backend(config: BucketBackendConfig, settings: ConfigDict) -> Backend:
    """Return a backend with a separate connector, so that appends do not queue behind uploads."""
    connector = config.connector or settings.connector
    new_connector = plugins.registry().connector_for(connector).factory
    retention = max(2 * settings.late_write_period, MIN_RETENTION, config.commit_retention)
    limits = Limits(
        retention=retention,
        trusted=min(retention / 4, MAX_TRUST),
        max_staleness=config.max_staleness,
        max_batch=config.max_batch,
    )
    return BucketBackend(
        config,
        new_connector(connector, settings),
        root=f"{settings.reserved_prefix}/catalog/{config.name}",
        limits=limits,
        lease_ttl=settings.lease_ttl,
        late_write_period=settings.late_write_period,
    )


class BucketBackend(Backend):
    """Catalog and journal as a log of objects in the bucket.

    Args:
        config: where the catalog is.
        connector: to the store of the catalog; opened and closed with the backend.
        root: prefix of the catalog's objects.
        limits: the limits in the design's rules.
        lease_ttl: seconds that a lease lasts.
        late_write_period: seconds for which late writes and retained locks are kept.
    """

    def __init__(
        self,
        config: BucketBackendConfig,
        connector: Connector,
        *,
        root: str,
        limits: Limits,
        lease_ttl: float,
        late_write_period: float,
    ) -> None:
        self._config = config
        self._connector = connector
        self._replica = Replica(
            Log(connector, config.namespace, root), limits, lease=lease_ttl, late=late_write_period
        )
        self._stack = AsyncExitStack()
        self._root = root
        self._process = process_name()
        self._catalog_id = ""
        # Whether the catalog was used since the last recovery.
        self._used = True

    @property
    @override
    def catalog_id(self) -> str:
        return self._catalog_id

    @property
    @override
    def guarantees(self) -> Guarantees:
        return Guarantees(shared="network", durable=True)

    @override
    async def open(self) -> None:
        self._stack.push_async_callback(self._connector.aclose)
        await self._connector.open()
        named = f"{self._connector.store_id}\n{self._config.namespace}\n{self._root}"
        name = sha256(named.encode()).hexdigest()[:32]
        path, kept = self._stack.enter_context(state_file(self._config.cache_dir, name))
        self._stack.push_async_callback(self._replica.aclose)
        await self._replica.open(path, kept=kept)
        if await self._replica.meta("catalog_id") is None:
            new_id = {"id": str(uuid_utils.uuid7())}
            await self._replica.run(Command("found", new_id))
        self._catalog_id = await self._replica.meta("catalog_id") or ""

    @override
    async def aclose(self) -> None:
        await self._stack.aclose()

    # --- what was probed ----------------------------------------------------------------------

    @override
    async def recall(self, name: str) -> str | None:
        return await self._noted(name, since=self._replica.now() - DAY)

    @override
    async def note(self, name: str) -> str | None:
        return await self._noted(name, since=0)

    async def _noted(self, name: str, *, since: int) -> str | None:
        def work(db: Connection) -> str | None:
            rows = db.execute(
                "SELECT value FROM notes WHERE name = ? AND noted_at > ?", (name, since)
            )
            return next((str(row[0]) for row in rows.fetchall()), None)

        # If it is not known here, the store is probed again; a read is not worth a request.
        return await self._replica.read(work, current=False)

    @override
    async def keep_note(self, name: str, value: str) -> None:
        await self.remember(name, value)

    @override
    async def ticket_key(self) -> bytes:
        kept = await self._replica.meta("ticket_key")
        if kept is None:
            # Another process may have stored one; the first one in the log counts.
            new_key = {"key": secrets.token_hex(32)}
            await self._replica.run(Command("keep_ticket_key", new_key))
            kept = await self._replica.meta("ticket_key")
        assert kept is not None  # noqa: S101 - the command keeps one
        try:
            return bytes.fromhex(kept)
        except ValueError as error:
            raise self._replica.unreadable(error) from error

    @override
    async def remember(self, name: str, value: str) -> None:
        await self._replica.run(Command("note", {"name": name, "value": value}))

    # --- catalog -----------------------------------------------------------------------------

    @override
    async def records(self, keys: Collection[ObjectKey]) -> Mapping[ObjectKey, Record]:
        if not keys:
            return {}
        self._used = True
        wanted = sorted(set(keys))

        def work(db: Connection) -> dict[ObjectKey, Record]:
            # No entry is applied while this runs, so that all records are from one moment (I9).
            return records_at(db, wanted)

        return await self._replica.read(work)

    @override
    async def scan(
        self, namespace: str, *, prefix: str, start: str, limit: int
    ) -> Sequence[Record]:
        self._used = True

        def work(db: Connection) -> list[Record]:
            return records_from(db, namespace, prefix, start, limit)

        return await self._replica.read(work)

    @override
    async def scan_names(
        self, namespace: str, *, prefix: str, start: str, limit: int, delimiter: str
    ) -> Sequence[Record]:
        self._used = True

        def work(db: Connection) -> list[Record]:
            return names_from(db, namespace, prefix, start, limit, delimiter)

        return await self._replica.read(work)

    @override
    async def fills(self) -> Sequence[Fill]:
        self._used = True

        def work(db: Connection) -> list[Fill]:
            rows = db.execute("SELECT namespace, prefix, fill_id FROM fills").fetchall()
            return [Fill(Area(namespace, prefix), fill_id) for namespace, prefix, fill_id in rows]

        return await self._replica.read(work)

    @override
    async def fill(self, fill: Fill, part: FillPart) -> bool:
        self._used = True
        arguments = {
            **_fill_arguments(fill),
            "records": [record_row(each) for each in part.records],
            "removed": sorted(part.removed),
            "begins": part.begins,
        }
        under_way: bool = await self._replica.run(Command("fill", arguments))
        return under_way

    @override
    async def end_fill(self, fill: Fill) -> None:
        self._used = True
        await self._replica.run(Command("end_fill", _fill_arguments(fill)))

    # --- a transaction -----------------------------------------------------------------------

    async def _run(self, name: str, token: TransactionToken, **arguments: object) -> object:
        self._used = True
        named = {"id": token.transaction_id, "token": token.fence, **arguments}
        return await self._replica.run(Command(name, named))

    @override
    async def begin_writes(
        self,
        token: TransactionToken,
        keys: Collection[ObjectKey],
        plan: Plan,
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        self._used = True
        arguments = {
            "id": token.transaction_id,
            "token": token.fence,
            "keys": key_rows(keys),
            "begins": begins,
            "by": self._process,
        }
        records: Mapping[ObjectKey, Record] = await self._replica.run(
            Command("begin_writes", arguments, plan)
        )
        return records

    @override
    async def note_upload(self, token: TransactionToken, seq: int, upload_id: str) -> None:
        await self._run("note_upload", token, seq=seq, upload=upload_id)

    @override
    async def commit(self, token: TransactionToken, commit: Commit) -> None:
        self._used = True
        arguments = {
            "id": token.transaction_id,
            "token": token.fence,
            "records": [record_row(each) for each in commit.records],
            "removed": key_rows(commit.removed),
            "steps": dump_steps(commit.steps),
            "late": [late_row(each) for each in commit.late_writes],
            "jobs": [job_row(each) for each in commit.jobs],
        }
        await self._replica.run(Command("commit", arguments, commit.reads))

    @override
    async def abort(self, token: TransactionToken, *, lock_wait: float | None = None) -> Decision:
        del lock_wait  # no database transaction stays open
        decision = await self._run("abort", token)
        assert isinstance(decision, Decision)  # noqa: S101 - the command returns one
        return decision

    @override
    async def relocate(self, token: TransactionToken, records: Sequence[Record]) -> None:
        await self._run("relocate", token, records=[record_row(each) for each in records])

    @override
    async def settle(self, token: TransactionToken, settlement: Settlement = FINISHED) -> None:
        await self._run(
            "settle",
            token,
            keys=None if settlement.keys is None else key_rows(settlement.keys),
            late=[late_row(each) for each in settlement.late_writes],
            keep=key_rows(settlement.keep_locked),
            checked=[late_row(each) for each in settlement.late_writes_checked],
        )

    # --- the feed of commits -----------------------------------------------------------------

    @property
    @override
    def keeps_commits(self) -> bool:
        return True

    @override
    async def commits(self, *, after: str | None, limit: int) -> Sequence[CommittedTransaction]:
        return await feed.commits(self._replica, after, limit)

    @override
    async def commit_cursor(self) -> str:
        return await feed.last_cursor(self._replica)

    # --- late writes -------------------------------------------------------------------------

    @override
    async def late_writes(self, keys: Collection[ObjectKey]) -> Collection[LateWrite]:
        self._used = True
        wanted = key_rows(keys)

        def work(db: Connection) -> list[LateWrite]:
            return [
                late_of(row)
                for key in wanted
                for row in db.execute(
                    "SELECT namespace, key, transaction_id, seq FROM late_writes "
                    "WHERE namespace = ? AND key = ? ORDER BY transaction_id, seq",
                    key,
                ).fetchall()
            ]

        return await self._replica.read(work)

    @override
    async def due_late_writes(self, *, after: LateWrite | None, limit: int) -> Sequence[LateWrite]:
        start = ("", "", "", -1) if after is None else tuple(late_row(after))
        if not await self._replica.read(_has_late_writes, current=False):
            return []
        await self._replica.learn_time()
        now = self._replica.now()

        def work(db: Connection) -> list[LateWrite]:
            rows = db.execute(
                "SELECT namespace, key, transaction_id, seq FROM late_writes WHERE due_at <= ? "
                "AND (namespace, key, transaction_id, seq) > (?, ?, ?, ?) AND NOT EXISTS "
                "(SELECT 1 FROM transactions AS t "
                "WHERE t.transaction_id = late_writes.transaction_id) "
                "ORDER BY namespace, key, transaction_id, seq LIMIT ?",
                (now, *start, limit),
            )
            return [late_of(row) for row in rows.fetchall()]

        # A late write is checked under a lock, and taking the lock reads the current state.
        return await self._replica.read(work, current=False)

    # --- leases and recovery -----------------------------------------------------------------

    @override
    async def heartbeat(
        self, transactions: Collection[TransactionToken]
    ) -> Collection[TransactionToken]:
        tokens = [list(each) for each in sorted(transactions)]
        kept: Collection[TransactionToken] = await self._replica.run(
            Command("heartbeat", {"tokens": tokens})
        )
        return kept

    @override
    async def claim(self, limit: int) -> Sequence[JournaledTransaction]:
        used, self._used = self._used, False
        if not await self._replica.read(_has_transactions, current=False):
            if not used:
                return []  # an idle process sends no requests
            await self._replica.current_position()
            if not await self._replica.read(_has_transactions, current=False):
                return []  # with no transaction, the store's time is not needed either
        claimed: list[str] = await self._replica.run(
            Command("claim", {"limit": limit, "by": self._process})
        )
        if not claimed:
            return []
        self._used = True
        now = self._replica.now()

        def work(db: Connection) -> list[JournaledTransaction]:
            found = [
                row
                for each in claimed
                for row in db.execute(
                    f"SELECT {_ROW} FROM transactions WHERE transaction_id = ?", (each,)
                ).fetchall()
            ]
            return [_journaled(db, row, now) for row in found]

        return await self._replica.read(work, current=False)

    @override
    async def transactions(self, *, after: str, limit: int) -> Sequence[JournaledTransaction]:
        self._used = True

        def work(db: Connection) -> list[JournaledTransaction]:
            rows = db.execute(
                f"SELECT {_ROW} FROM transactions WHERE transaction_id > ? "
                "ORDER BY transaction_id LIMIT ?",
                (after, limit),
            ).fetchall()
            now = self._replica.now()
            return [_journaled(db, row, now) for row in rows]

        if not await self._replica.read(_has_transactions):
            return []
        await self._replica.learn_time()
        return await self._replica.read(work, current=False)

    @override
    async def hold(self, token: TransactionToken, commit: Commit, seconds: float) -> None:
        await self._run("hold", token, commit=dump_commit(commit), seconds=round(seconds * SECOND))

    @override
    async def take_held(self, transaction_id: str) -> JournaledTransaction | None:
        self._used = True
        token = await self._replica.run(
            Command("take_held", {"id": transaction_id, "by": self._process})
        )
        if token is None:
            return None
        now = self._replica.now()

        def work(db: Connection) -> JournaledTransaction | None:
            row = db.execute(
                f"SELECT {_ROW} FROM transactions WHERE transaction_id = ? AND token = ?",
                (transaction_id, token),
            ).fetchone()
            return None if row is None else _journaled(db, row, now)

        return await self._replica.read(work, current=False)

    # --- compensations and hooks -------------------------------------------------------------

    @property
    @override
    def keeps_jobs(self) -> bool:
        return True

    @override
    async def add_jobs(self, jobs: Collection[Job]) -> None:
        self._used = True
        await self._replica.run(Command("add_jobs", {"jobs": [job_row(each) for each in jobs]}))

    @override
    async def claim_jobs(
        self,
        names: Collection[str],
        *,
        limit: int,
        transaction_id: str | None = None,
        hurry: bool = False,
    ) -> Sequence[Job]:
        # A process knows the jobs that it has journaled itself; it has to look for those of others.
        if not await self._replica.read(has_jobs, current=transaction_id is None):
            return []
        arguments = {
            "names": sorted(names),
            "limit": limit,
            "transaction": transaction_id,
            "hurry": hurry,
            "in_order": ATTEMPTS_IN_ORDER,
        }
        rows = await self._replica.run(Command("claim_jobs", arguments))
        return [job_of(row) for row in rows]

    @override
    async def keep_job(
        self, job: Job, *, retry_in: float | None = None, error: str | None = None
    ) -> bool:
        arguments = {
            "id": job.transaction_id,
            "number": job.number,
            "attempts": job.attempts,
            "pause": None if retry_in is None else round(retry_in * SECOND),
            "error": error,
        }
        kept: bool = await self._replica.run(Command("keep_job", arguments))
        return kept

    @override
    async def end_jobs(self, jobs: Collection[Job]) -> None:
        rows = [[each.transaction_id, each.number, each.attempts] for each in jobs]
        await self._replica.run(Command("end_jobs", {"jobs": rows}))

    @override
    async def jobs(self, *, limit: int, transaction_id: str | None = None) -> Sequence[Job]:
        return await self._replica.read(lambda db: jobs_in(db, transaction_id, limit))

    @override
    async def known(self, transaction_ids: Collection[str]) -> Collection[str]:
        if not transaction_ids:
            return []
        self._used = True
        wanted = list(transaction_ids)

        def work(db: Connection) -> list[str]:
            return [
                each
                for each in wanted
                if db.execute(
                    "SELECT 1 FROM transactions WHERE transaction_id = ?", (each,)
                ).fetchall()
            ]

        return await self._replica.read(work)


def _fill_arguments(fill: Fill) -> dict[str, object]:
    return {"id": fill.fill_id, "area": list(fill.area), "hidden": fill.hidden}


def _has_late_writes(db: Connection) -> bool:
    return bool(db.execute("SELECT 1 FROM late_writes LIMIT 1").fetchall())


def _has_transactions(db: Connection) -> bool:
    return bool(db.execute("SELECT 1 FROM transactions LIMIT 1").fetchall())


def _journaled(db: Connection, row: Sequence[object], now: int) -> JournaledTransaction:
    transaction_id, fence, began_at, lease_until, outcome, held, held_until, process = row
    assert isinstance(began_at, int)  # noqa: S101 - the table says so
    assert isinstance(lease_until, int)  # noqa: S101 - as above
    assert isinstance(fence, int)  # noqa: S101 - as above
    held_left = (held_until - now) / SECOND if isinstance(held_until, int) else 0.0
    intents = db.execute(
        "SELECT seq, namespace, key, placement, target, upload_id FROM intents "
        "WHERE transaction_id = ? ORDER BY seq",
        (transaction_id,),
    ).fetchall()
    return JournaledTransaction(
        token=TransactionToken(str(transaction_id), fence),
        outcome=None if outcome is None else Outcome(str(outcome)),
        age=(now - began_at) / SECOND,
        lease_left=(lease_until - now) / SECOND,
        intents=[intent_of(each) for each in intents],
        held=None if held is None else load_commit(str(held)),
        held_left=held_left,
        process=str(process),
    )
