"""The log in the bucket in a simulated world: a replica in each process, and one that the model reads.

The requests of the log meet the same faults as those for objects. The model's own replica meets none,
and reads each entry as soon as it is created: that is when a transaction is committed.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from typing_extensions import override

from controlled_loop import PROCESS, ControlledLoop
from fennflow import ConfigDict, plugins
from fennflow.backends import BucketBackendConfig
from fennflow.config import ConnectorConfig
from fennflow.connectors import Connector, StoredObject
from fennflow.exceptions import CatalogDivergedException
from fennflow.hookspecs import ConnectorPlugin, hookimpl
from fennflow.testing.faults import Faults, FaultyConnector, FaultyConnectorConfig
from fennflow_bucket import backend, clocks, following, log, replica, turns
from fennflow_bucket.backend import BucketBackend
from fennflow_bucket.following import Follower, Limits
from fennflow_bucket.replica import Replica
from fennflow_bucket.state import State

SNAPSHOT_ENTRIES = 10
"""Entries after which there is a snapshot: a walk makes some dozens."""


class LogConnectorConfig(FaultyConnectorConfig):
    """The store, as the log of a process reaches it."""


class LogConnector(FaultyConnector):
    """Hands listings to the faults, too: the log depends on what changes between two of them."""

    @override
    async def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        async def nothing() -> None:
            """Begin."""

        await self._around("list", prefix, nothing)
        async for stored in self.inner.list(namespace, prefix, start_after=start_after):
            yield stored


class WatchingReplica(Replica):
    """Is current at once, without tasks of its own, and reports what is committed."""

    on_commit: Callable[[str], None]

    async def catch_up(self) -> None:
        """Read what was appended."""
        await self._look()

    def retained(self) -> tuple[set[str], int]:
        """Return the keys that wait for late writes, and how many locks are kept for some."""
        reading = self._opened().reading
        late = {key for (key,) in reading.execute("SELECT key FROM late_writes")}
        [[kept]] = reading.execute("SELECT count(kept_until) FROM locks")
        return late, kept

    @override
    async def _current(self, allowed: float = 0.0) -> None:
        await self._look()

    @override
    async def _read_many(self, first: int, count: int) -> list[bytes]:
        bodies: list[bytes] = []
        for position in range(first, first + count):
            body = await self._log.read(position)
            if body is None:
                break
            bodies.append(body)
        return bodies

    @override
    async def _apply(self, bodies: Sequence[bytes]) -> None:
        await super()._apply(bodies)
        for body in bodies:
            for name, arguments in log.load_entry(body, "an entry").commands:
                if name == "commit":
                    self.on_commit(arguments["id"])


@dataclass(eq=False)
class WatchedLog:
    """The log of a world.

    Args:
        directory: for the local copies of the catalog.
        namespace: the bucket.
        skews: seconds by which the wall clocks of processes are wrong, in turn.
        max_batch: commands that share an entry.
        diverged: the errors of replicas about entries that do not continue their state.
    """

    directory: Path
    namespace: str
    skews: Sequence[float] = (0.0,)
    max_batch: int = 256
    diverged: list[str] = field(default_factory=list[str])
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def config(self, store: ConnectorConfig, faults: Faults | None = None) -> BucketBackendConfig:
        """Return the configuration of a process, or without faults that of the model's replica."""
        return BucketBackendConfig(
            namespace=self.namespace,
            connector=store if faults is None else LogConnectorConfig(inner=store, faults=faults),
            max_batch=self.max_batch,
        )

    def watch(
        self, config: BucketBackendConfig, settings: ConfigDict, on_commit: Callable[[str], None]
    ) -> BucketBackend:
        """Return the model's backend."""
        with mock.patch.object(backend, "Replica", WatchingReplica):
            watching = cast("BucketBackend", backend.new_backend(config, settings))
        replica_of(watching).on_commit = on_commit
        return watching

    def patches(
        self, loop: ControlledLoop, new_id: Callable[[], object]
    ) -> Iterable[tuple[object, str, object]]:
        """Return what is taken from the simulation."""

        def wall() -> float:
            return loop.now + self.skews[PROCESS.get() % len(self.skews)]

        clock = SimpleNamespace(
            time=wall, monotonic=lambda: loop.now, clock_gettime=lambda _: loop.now
        )
        original = Follower._diverge

        def diverge(replica: Follower, position: int, reason: str) -> CatalogDivergedException:
            self.diverged.append(f"entry {position}: {reason}")
            return original(replica, position, reason)

        return (
            (clocks, "time", clock),
            (turns, "time", clock),
            (replica, "uuid4", new_id),
            (log, "uuid4", new_id),
            (backend, "Limits", partial(Limits, snapshot_entries=SNAPSHOT_ENTRIES)),
            (backend, "state_file", self._state_file),
            (following.Follower, "_diverge", diverge),
        )

    @contextmanager
    def _state_file(self, _: Path | None, name: str) -> Generator[tuple[Path, bool]]:
        path = self.directory / f"{name}.{next(self._numbers)}.db"
        path.write_bytes(_empty_state())
        yield path, False

    def close(self) -> None:
        """Remove the local copies."""
        for file in self.directory.glob("*.db*"):
            file.unlink()


@cache
def _empty_state() -> bytes:
    """Return the local copy of an empty catalog, made once: its tables take a tenth of a walk."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "empty.db"
        State(path, kept=False).close()
        return path.read_bytes()


def replica_of(watching: object) -> WatchingReplica:
    """Return the replica of the model's backend."""
    found: WatchingReplica = cast("Any", watching)._replica
    return found


def _new_connector(config: LogConnectorConfig, settings: ConfigDict) -> Connector:
    inner = plugins.registry().connector_for(config.inner).factory(config.inner, settings)
    return LogConnector(inner, config.faults)


@hookimpl
def fennflow_connectors() -> Iterable[ConnectorPlugin]:
    """Return the connector."""
    return [ConnectorPlugin("log", LogConnectorConfig, _new_connector)]
