"""The objects of a catalog in the bucket: entries, snapshots, boundaries; all created once."""

from __future__ import annotations

import json
import logging
import sqlite3
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

from fennflow.connectors import (
    Connector,
    Deletion,
    Location,
    ObjectAttributes,
    PutRequest,
    StoredObject,
)
from fennflow.exceptions import (
    BaseConnectorException,
    ConfigException,
    ConnectorCapabilityException,
    IncompleteListingException,
    NoSuchKeyException,
    PreconditionFailedException,
)
from fennflow_bucket.clocks import boot_time
from fennflow_bucket.rows import dumps

logger = logging.getLogger("fennflow")

FORMAT = 1
"""The version of entries and snapshots. A process that finds a newer one refuses to use the catalog."""
DIGITS = 20
LOG, SNAPSHOT, BOUNDARY, PROBE = "log", "snapshot", "boundary", "probe"

DAMAGE: tuple[type[Exception], ...] = (
    ArithmeticError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)
"""Exceptions while an object that FennFlow did not write is read and applied."""
ENTRY_TYPE = ObjectAttributes(media_type="application/json", metadata={"fennflow_log": "1"})
SNAPSHOT_TYPE = ObjectAttributes(media_type="application/gzip", metadata={"fennflow_log": "1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One entry of the log.

    Args:
        position: its position in the log.
        writer: the process that wrote it.
        seq: numbers the entries of a writer.
        at: the time that the writer proposes, in microseconds by the store's clock (L10).
        digest: the digest of the state before it (L12).
        lease: how long a lease that it grants lasts, in microseconds.
        late: how long after it a late write of its commands is due, in microseconds.
        waited: microseconds from the first attempt to append its commands to this one (L1).
        commands: names and arguments of its commands.
    """

    position: int
    writer: str
    seq: int
    at: int
    digest: int
    lease: int
    late: int
    waited: int
    commands: Sequence[tuple[str, Any]]

    def dump(self) -> bytes:
        """Return the bytes of its object."""
        value = {
            "format": FORMAT,
            "position": self.position,
            "writer": self.writer,
            "seq": self.seq,
            "at": self.at,
            "digest": f"{self.digest:x}",
            "lease": self.lease,
            "late": self.late,
            "waited": self.waited,
            "commands": self.commands,
        }
        return zlib.compress(dumps(value).encode(), level=1)


def load_entry(body: bytes, name: str) -> LogEntry:
    """Return the entry that `LogEntry.dump` wrote.

    Raises:
        ConfigException: a newer version of FennFlow wrote it.
        DAMAGE: it is not an entry of a log.
    """
    try:
        value = json.loads(zlib.decompress(body))
    except zlib.error as error:
        raise ValueError(str(error)) from error
    check_format(value, name)
    return LogEntry(
        position=value["position"],
        writer=value["writer"],
        seq=value["seq"],
        at=value["at"],
        digest=int(value["digest"], 16),
        lease=value["lease"],
        late=value["late"],
        waited=value["waited"],
        commands=[(command, arguments) for command, arguments in value["commands"]],
    )


def check_format(value: Any, name: str) -> None:
    """Refuse an object that a newer version wrote.

    Raises:
        ConfigException: the version is newer.
        ValueError: there is no version.
    """
    fields = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    found = fields.get("format")
    if not isinstance(found, int):
        message = "it names no version of the format"
        raise ValueError(message)  # noqa: TRY004 - a damaged object, no caller's mistake
    if found != FORMAT:
        message = (
            f"{name} has version {found} of the catalog's format, but this fennflow-bucket supports "
            f"version {FORMAT}. Upgrade fennflow-bucket; nothing was changed."
        )
        raise ConfigException(message)


class Log:
    """The objects of one catalog.

    Args:
        connector: sends the requests.
        namespace: the bucket.
        root: the prefix of the catalog, without a slash at its end.
    """

    def __init__(self, connector: Connector, namespace: str, root: str) -> None:
        self.connector = connector
        self.namespace = namespace
        self.root = root

    def name(self, kind: str, position: int) -> str:
        """Return the key of an object."""
        return f"{self.root}/{kind}/{position:0{DIGITS}}"

    async def create(self, kind: str, position: int, body: bytes) -> None:
        """Create an object.

        Raises:
            PreconditionFailedException: it exists, or the store cannot decide yet.
            Exception: it may have been created, unless a BaseConnectorException says that it is
                not `ambiguous`.
        """
        await self.connector.put(
            PutRequest(self.namespace, self.name(kind, position), ENTRY_TYPE, if_none_match=True),
            body,
        )

    async def read(self, position: int) -> bytes | None:
        """Return the bytes of an entry; None if there is none."""
        try:
            _, body = await self.connector.get(self.namespace, Location(self.name(LOG, position)))
        except NoSuchKeyException:
            return None
        return body

    async def head(self, position: int) -> StoredObject | None:
        """Return the store's description of an entry."""
        return await self.connector.head(self.namespace, Location(self.name(LOG, position)))

    async def list(self, kind: str, *, after: int = -1) -> dict[int, StoredObject]:
        """Return the objects of a kind after a position, by position, in order."""
        prefix = self._prefix(kind)
        start_after = self.name(kind, after) if after >= 0 else ""
        found: dict[int, StoredObject] = {}
        try:
            async for stored in self.connector.list(
                self.namespace, prefix, start_after=start_after
            ):
                position = self._position(kind, stored.location.key)
                if position is not None and position > after:
                    found[position] = stored
        except IncompleteListingException as error:
            # For local files, each file that was left out is named. Names that cannot be entries
            # are ignored.
            hidden = (self._position(kind, each) is not None for each in error.prefixes)
            if any(each.endswith("/") or not each for each in error.prefixes) or any(hidden):
                raise
        return dict(sorted(found.items()))

    def _prefix(self, kind: str) -> str:
        return f"{self.root}/{kind}/"

    def _position(self, kind: str, key: str) -> int | None:
        """Return the position of an object by its key; None if it is not one of the kind."""
        digits = key.removeprefix(self._prefix(kind))
        whole = len(digits) == DIGITS and digits.isascii() and digits.isdecimal()
        return int(digits) if whole else None

    async def upload_snapshot(self, position: int, chunks: AsyncIterator[bytes]) -> None:
        """Create a snapshot from chunks; leftovers of a failed attempt are removed.

        Raises:
            PreconditionFailedException: a snapshot of this position exists.
        """
        key = self.name(SNAPSHOT, position)
        uploads: list[str] = []

        async def note(upload_id: str) -> None:
            uploads[:] = [upload_id]

        try:
            await self.connector.upload(
                PutRequest(self.namespace, key, SNAPSHOT_TYPE, if_none_match=True, on_upload=note),
                chunks,
            )
        except BaseException:
            for upload_id in uploads:
                try:
                    await self.connector.abort_upload(self.namespace, key, upload_id)
                except Exception as error:  # noqa: BLE001 - logged; the first one is raised
                    logger.warning(
                        "The upload %s of the snapshot %s/%s was cut off, and its parts could not be "
                        "deleted: %r. They are deleted after a later snapshot.",
                        upload_id,
                        self.namespace,
                        key,
                        error,
                    )
            raise

    async def abort_uploads(self, *, until: int, before: float) -> None:
        """Abort multipart uploads of snapshots of processes that have died.

        Args:
            until: the position up to which snapshots are no longer needed.
            before: seconds since the epoch, by the store's clock; uploads that began later are
                kept.

        Raises:
            BaseConnectorException: not all could be listed, or aborted.
        """
        with suppress(ConnectorCapabilityException):  # the connector cannot list uploads
            async for each in self.connector.uploads(self.namespace, self._prefix(SNAPSHOT)):
                position = self._position(SNAPSHOT, each.key)
                if position is None or position > until or each.modified_at is None:
                    continue
                if each.modified_at.timestamp() < before:
                    await self.connector.abort_upload(self.namespace, each.key, each.upload_id)

    def stream(self, snapshot: StoredObject) -> AsyncIterator[bytes]:
        """Return the bytes of a snapshot in chunks."""
        return self.connector.stream(self.namespace, snapshot.location, if_match=snapshot.etag)

    async def delete(self, found: Sequence[StoredObject]) -> None:
        """Delete objects, including their versions.

        Raises:
            BaseConnectorException: some could not be deleted.
        """
        versioned = (await self.connector.capabilities(self.namespace)).versioned
        places = [each.location for each in found]
        if versioned:
            places = [
                version.location
                for each in found
                for version in await self.connector.versions(self.namespace, each.location.key)
            ]
        at_once = self.connector.max_deletions
        for start in range(0, len(places), at_once):
            batch = [Deletion(location=each) for each in places[start : start + at_once]]
            report = await self.connector.delete(self.namespace, batch)
            for error in report.errors:
                if error is not None:
                    raise error

    async def probe(self, sample: Callable[[float, float], None]) -> None:
        """Check that the store can hold a log (L13), and learn its time (L10).

        Args:
            sample: called with the store's time of an object that was just created, in seconds
                since the epoch, and the `boot_time` at which its creation was confirmed.

        Raises:
            ConfigException: it cannot hold a log.
        """
        prefix = f"{self.root}/{PROBE}/"
        key = f"{prefix}{uuid4()}"
        place = Location(key)

        async def put() -> Location | None:
            try:
                stored = await self.connector.put(
                    PutRequest(self.namespace, key, ENTRY_TYPE, if_none_match=True), b"probe"
                )
            except PreconditionFailedException:
                return None
            return stored.location

        try:
            place = await put() or place
            created = boot_time()
            if await put() is not None:
                observed = "created an object under an existing key, despite If-None-Match: *"
                raise self._unsuitable(observed)
            seen: StoredObject | None = None
            async for stored in self.connector.list(self.namespace, prefix):
                if stored.location.key == key:
                    seen = stored
            if seen is None:
                observed = "did not list an object that had just been written"
                raise self._unsuitable(observed)
            if seen.modified_at is not None:
                sample(seen.modified_at.timestamp(), created)
        finally:
            with suppress(BaseConnectorException):
                await self.connector.delete(self.namespace, [Deletion(location=place)])

    def _unsuitable(self, observed: str) -> ConfigException:
        message = (
            f"The store of {self.namespace} cannot hold a catalog: it {observed}. Nothing was "
            "changed. Keep the catalog in a database instead: "
            "SqlalchemyBackendConfig(url='sqlite:///fennflow.db') for the processes of one "
            "machine, or a URL of PostgreSQL for several machines."
        )
        return ConfigException(message)
