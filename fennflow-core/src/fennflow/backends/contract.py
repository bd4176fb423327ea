"""The contract of a backend; `fennflow.backends` lists which method is called when."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence

from fennflow.backends.values import (
    FINISHED,
    Commit,
    CommittedTransaction,
    Decision,
    Fill,
    FillPart,
    Guarantees,
    Intent,
    Job,
    JournaledTransaction,
    LateWrite,
    ObjectKey,
    Record,
    Settlement,
    TransactionToken,
)
from fennflow.exceptions import ConfigException
from fennflow.paths import after_name

SCANNED = 100
"""How many records to read at a time if one may represent all of them."""

_TICKET_KEY = secrets.token_bytes(32)

Plan = Callable[[Mapping[ObjectKey, Record]], Sequence[Intent]]


class JoinedTransaction(ABC):
    """A user's own database transaction, in which a pivot is written (`UOW(join=...)`)."""

    @property
    @abstractmethod
    def managed_by_caller(self) -> bool:
        """Whether the user's own block ends it; otherwise the unit of work ends it."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether it has been committed or rolled back, so that the decision can be read."""

    @abstractmethod
    async def commit(self, token: TransactionToken, commit: Commit | None) -> None:
        """Write the pivot in it, then end it unless it surrounds the unit of work.

        Like `Backend.commit`, except that it touches no row of the journal, which the transaction
        may not see. If it raises after the first statement, the transaction is rolled back.

        It has to be the transaction that was open when the unit of work joined, or that began after
        the last `commit` or `rollback`. Otherwise files and rows would not commit together.

        Args:
            token: of the transaction; it is checked.
            commit: what to write; None if there is nothing to write, and the transaction only has
                to end.

        Raises:
            TransactionException: the transaction has ended inside the block, or cannot hold a
                pivot; nothing was written.
            Exception: as for `Backend.commit`, or raised by the end of the transaction.
        """

    @abstractmethod
    async def rollback(self) -> None:
        """Roll it back unless it surrounds the unit of work.

        Raises:
            TransactionException: it was committed inside the block, so its rows are kept.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop observing it, since the unit of work has ended. `ended` can still be read."""


class Backend(ABC):
    """Catalog and journal. `fennflow.backends` lists which method is called when."""

    @property
    @abstractmethod
    def catalog_id(self) -> str:
        """The id of this catalog, by which its objects are distinguished in a shared bucket (P10).

        At most 128 visible ASCII characters, no `/`.
        """

    @property
    def guarantees(self) -> Guarantees:
        """What it guarantees. Not abstract: by default nothing beyond the process."""
        return Guarantees()

    @property
    def stamped_id(self) -> str | None:
        """The id in the stamps of this catalog's objects; other catalogs leave such objects alone.

        None if the catalog ends with its process: the next one has to take over its objects.
        """
        return self.catalog_id if self.guarantees.durable else None

    @abstractmethod
    async def open(self) -> None:
        """Acquire connections and create missing tables, on the running event loop."""

    @abstractmethod
    async def aclose(self) -> None:
        """Release connections; nothing is called afterwards."""

    async def recall(self, name: str) -> str | None:
        """Return the text that `remember` stored within the last day, by the backend's clock.

        Not abstract, like `remember`: without them, every process probes the store itself (P15).
        """
        del name
        return None

    async def remember(self, name: str, value: str) -> None:
        """Store a text for other processes."""
        del name, value

    async def note(self, name: str) -> str | None:
        """Return the text that `keep_note` stored under a name, however long ago.

        Not abstract, like `keep_note`: without them, `fennflow doctor` does not report what
        reconciliation could not record.
        """
        del name
        return None

    async def keep_note(self, name: str, value: str) -> None:
        """Store a text for as long as the catalog exists."""
        del name, value

    async def ticket_key(self) -> bytes:
        """Return the key that signs this catalog's tickets for uploads: at least 32 random bytes.

        Not abstract: if it is not stored, a ticket is valid only in the process that made it.
        """
        return _TICKET_KEY

    @abstractmethod
    async def records(self, keys: Collection[ObjectKey]) -> Mapping[ObjectKey, Record]:
        """Return the records of those keys that have one, all from one moment (I9)."""

    @abstractmethod
    async def scan(
        self, namespace: str, *, prefix: str, start: str, limit: int
    ) -> Sequence[Record]:
        """Return up to `limit` records in key order, with the prefix and not before `start`.

        Keys compare as UTF-8 bytes.
        """

    async def scan_names(
        self, namespace: str, *, prefix: str, start: str, limit: int, delimiter: str
    ) -> Sequence[Record]:
        """Like `scan`, but return only the first of all keys with the same name up to the delimiter.

        Not abstract: this implementation reads all records. A backend can read one for each name
        instead.
        """
        found: list[Record] = []
        following: str | None = start
        while following is not None and len(found) < limit:
            records = await self.scan(namespace, prefix=prefix, start=following, limit=SCANNED)
            for record in records:
                if following is not None and record.key >= following:
                    found.append(record)
                    following = after_name(record.key, prefix, delimiter)
            if len(records) < SCANNED:
                break
        return found[:limit]

    @abstractmethod
    async def fills(self) -> Sequence[Fill]:
        """Return the fills that have begun and not ended."""

    @abstractmethod
    async def fill(self, fill: Fill, part: FillPart) -> bool:
        """Add records to a fill: hidden, in the namespace `fill.hidden`, until it ends.

        Returns:
            whether the fill is in progress. If not, nothing was done: another process has ended it,
            or has begun one with another id.
        """

    @abstractmethod
    async def end_fill(self, fill: Fill) -> None:
        """Make the added records visible in one transaction, except for keys that now have a record."""

    async def add_details(self, records: Collection[Record]) -> None:
        """Replace records that are `only_listed` by ones of the same writes, without waiting.

        Not abstract: if they are not stored, the store is asked again.
        """
        del records

    @abstractmethod
    async def begin_writes(
        self,
        token: TransactionToken,
        keys: Collection[ObjectKey],
        plan: Plan,
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        """Lock keys and write intents for them: all or nothing.

        In one transaction, in this order: the transaction's row is written if it is new, and its lease
        runs from now (P22); the keys are locked in sorted order (a key that the transaction holds already counts as locked); their
        records are read; `plan(records)` says which intents to write; they are written.

        Args:
            token: of the transaction.
            keys: the keys to lock.
            plan: a pure function, which may be called in another thread, and more than once. An
                exception of it undoes the database transaction and propagates.
            begins: whether the transaction may be new. If not, and it has no row, others have
                finished it, perhaps so long ago that its outcome was removed: it is lost.

        Returns:
            the records of the keys. They cannot change until the transaction is finished (P6).

        Raises:
            RecordLockedException: another transaction holds one of the keys. The engine waits.
            TransactionLostException: the token is no longer the transaction's, or it was decided.
        """

    @abstractmethod
    async def note_upload(self, token: TransactionToken, seq: int, upload_id: str) -> None:
        """Store the upload id in an intent.

        Raises:
            TransactionLostException: the token is no longer the transaction's.
        """

    @abstractmethod
    async def commit(self, token: TransactionToken, commit: Commit) -> None:
        """The pivot: decide `committed` and make all changes visible in one instant (P4, P5).

        Raises:
            ConflictException: a record of `commit.reads` changed. Nothing happened.
            TransactionLostException: this owner has lost the transaction, or it was decided
                `aborted`. Nothing happened.
            Exception: with any other exception the outcome is unknown; the engine then calls
                `abort`.
        """

    async def join(self, transaction: object) -> JoinedTransaction:
        """Return an object that writes pivots inside a user's transaction on this database.

        Not abstract: most backends do not use a database of the user's.

        Raises:
           ConfigException: it is not such a transaction, or not on the catalog's database.
        """
        message = (
            f"{type(self).__name__} cannot commit in the transaction of {type(transaction)}. "
            "UOW(join=...) takes an AsyncSession or AsyncConnection of SQLAlchemy, on the database "
            "of a SqlalchemyBackendConfig: pip install 'fennflow[sqlite]>=1.0' or "
            "'fennflow[postgresql]>=1.0'."
        )
        raise ConfigException(message)

    @abstractmethod
    async def abort(self, token: TransactionToken, *, lock_wait: float | None = None) -> Decision:
        """Decide `aborted` unless the transaction is decided already (P5).

        Args:
            token: the transaction's.
            lock_wait: seconds to wait for an open transaction that holds the decision; None for the
                backend's default.

        Returns:
            the valid outcome, and the remaining work. COMMITTED means that a pivot whose answer was
            lost has succeeded. If the journal has no rows of the transaction, it is `finished`, no
            matter which process finished it.

        Raises:
            TransactionLostException: the journal has rows, under another token.
            CommitUncertainException: a transaction that is still open holds the decision; call
                again when it has ended. Nothing happened.
        """

    @abstractmethod
    async def relocate(self, token: TransactionToken, records: Sequence[Record]) -> None:
        """Replace records by ones that differ only in `location` and `etag` (P28).

        Raises:
            TransactionLostException: the token is no longer the transaction's.
        """

    @abstractmethod
    async def settle(self, token: TransactionToken, settlement: Settlement = FINISHED) -> None:
        """Remove the transaction's rows and locks, or those of some keys; nothing if it has none.

        The outcome is kept for at least another `late_write_period` (P5).

        Raises:
            TransactionLostException: the token is no longer the transaction's.
        """

    @abstractmethod
    async def late_writes(self, keys: Collection[ObjectKey]) -> Collection[LateWrite]:
        """Return the late writes of keys that are in the journal (P14)."""

    @abstractmethod
    async def due_late_writes(self, *, after: LateWrite | None, limit: int) -> Sequence[LateWrite]:
        """Return up to `limit` late writes that can no longer arrive and whose transaction is finished (P20 a).

        Args:
            after: return only late writes after this one, by namespace, key, transaction id and
                sequence.
            limit: how many.
        """

    @abstractmethod
    async def heartbeat(
        self, transactions: Collection[TransactionToken]
    ) -> Collection[TransactionToken]:
        """Renew the leases of transactions (P22) without waiting for locks.

        Returns:
            the transactions whose lease was renewed. The others have another token, or an open
            database transaction holds their row at this moment.
        """

    @abstractmethod
    async def claim(self, limit: int) -> Sequence[JournaledTransaction]:
        """Take over up to `limit` transactions whose lease has run out (P24).

        In one transaction, the token of each is raised and its lease starts again, so that only one
        of several recovering processes gets it, and the former owner is refused from then on. This
        is also the place to remove expired rows: outcomes (P5) and retained locks.

        Returns:
            the claimed transactions, with their new tokens.
        """

    @abstractmethod
    async def transactions(self, *, after: str, limit: int) -> Sequence[JournaledTransaction]:
        """Return up to `limit` transactions of the journal with ids after `after`, in order."""

    @abstractmethod
    async def known(self, transaction_ids: Collection[str]) -> Collection[str]:
        """Return which of the transactions the journal has rows of (P27)."""

    # --- held transactions; not abstract: a backend may not support them -------------------------

    async def hold(self, token: TransactionToken, commit: Commit, seconds: float) -> None:
        """Let a transaction wait for another process to commit or abort it (P37).

        Args:
            token: the transaction, which is undecided. Its lease is extended to the same time.
            commit: what its pivot will write.
            seconds: for how long; after that, recovery aborts it.

        Raises:
            TransactionLostException: the token is no longer the transaction's, or it was decided.
            ConfigException: the backend does not support this.
        """
        del token, commit, seconds
        message = f"{type(self).__name__} cannot hold transactions."
        raise ConfigException(message)

    async def take_held(self, transaction_id: str) -> JournaledTransaction | None:
        """Claim a transaction that is held and undecided, even if its lease has not run out (P37).

        Returns:
            the claimed transaction, with a new token and a lease of `lease_ttl`; None if it is not
            held.
        """
        del transaction_id
        return None

    # --- the feed of commits; not abstract: a backend without one says so -------------------------

    @property
    def keeps_commits(self) -> bool:
        """Whether it has a feed of commits: the methods below."""
        return False

    async def commits(self, *, after: str | None, limit: int) -> Sequence[CommittedTransaction]:
        """Return up to `limit` transactions that were committed, in the order of the feed (P38).

        Transactions without changed records are left out. Records of a fill are not in the feed,
        since no transaction committed them.

        Args:
            after: a cursor; the feed continues after it. None to begin with the first entry that is
                kept.
            limit: how many.

        Returns:
            the entries; empty at the end of the feed.

        Raises:
            CursorException: some entries after the cursor were removed, or it is not a cursor of
                this feed.
            ConfigException: the backend has no feed.
        """
        del after, limit
        raise without_commits(self)

    async def commit_cursor(self) -> str:
        """Return the cursor of the end of the feed: commits from now on come after it.

        Raises:
            ConfigException: the backend has no feed.
        """
        raise without_commits(self)

    # --- compensations and hooks; not abstract: a backend without them refuses durable steps ------

    @property
    def keeps_jobs(self) -> bool:
        """Whether it journals compensations and hooks: the methods below, and `Commit.jobs`."""
        return False

    async def add_jobs(self, jobs: Collection[Job]) -> None:
        """Journal compensations (P33).

        A job that already exists, by transaction and number, gets the given `after` and can be
        claimed immediately; an attempt in progress can no longer end it.

        Args:
            jobs: each is due when its transaction has the outcome `after`; immediately if that is
                None.
        """
        del jobs
        raise without_jobs(self)

    async def claim_jobs(
        self,
        names: Collection[str],
        *,
        limit: int,
        transaction_id: str | None = None,
        hurry: bool = False,
    ) -> Sequence[Job]:
        """Take jobs that are due, so that no other process calls them for `lease_ttl` (P35).

        These jobs are due: compensations whose transaction is decided `aborted`, or has neither an
        outcome nor a row; compensations that are due however it ends; and hooks, which the pivot
        has written. A compensation that `waits_for` another one is not due, nor is a hook while an
        earlier hook with its key exists.

        Args:
            names: the names of the functions that the caller has registered.
            limit: how many.
            transaction_id: take only jobs of this transaction.
            hurry: also take jobs that failed and whose next attempt is not due yet.

        Returns:
            the jobs, with `attempts` raised by one.
        """
        del names, limit, transaction_id, hurry
        return ()

    async def keep_job(
        self, job: Job, *, retry_in: float | None = None, error: str | None = None
    ) -> bool:
        """Renew the lease of a claimed job for another `lease_ttl`, or give the job back.

        Args:
            job: as it was claimed.
            retry_in: None to renew its lease; otherwise the seconds until the next attempt is due.
            error: why this attempt failed.

        Returns:
            whether the caller still has it: it was not claimed by another process or journaled
            again.
        """
        del job, retry_in, error
        return False

    async def end_jobs(self, jobs: Collection[Job]) -> None:
        """Remove jobs whose `attempts` are unchanged: they were called, or never have to be."""
        del jobs

    async def jobs(self, *, limit: int, transaction_id: str | None = None) -> Sequence[Job]:
        """Return jobs that are due or being called, or all jobs of a transaction, oldest first."""
        del limit, transaction_id
        return ()


def without_jobs(backend: Backend) -> ConfigException:
    """Return the error of a backend that cannot journal compensations and hooks."""
    message = (
        f"{type(backend).__name__} cannot journal compensations or hooks, so the step was not "
        "done. Use a backend whose `keeps_jobs` is true, such as SqlalchemyBackendConfig's, or "
        "a plain function, which is not called after a crash."
    )
    return ConfigException(message)


def without_commits(backend: Backend) -> ConfigException:
    """Return the error of a backend that has no feed of commits."""
    message = (
        f"{type(backend).__name__} keeps no feed of commits. Use a backend whose `keeps_commits` is true, "
        "such as SqlalchemyBackendConfig's or BucketBackendConfig's."
    )
    return ConfigException(message)
