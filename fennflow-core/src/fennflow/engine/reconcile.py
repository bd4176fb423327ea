"""Reconciliation: bringing the catalog and a bucket together where they differ.

Bucket and catalog are walked together, in whatever order the store lists and in constant memory. What
differs is looked at once more, a batch at a time,
and where something is to be done that happens under the keys' locks and through the journal, like
everything else that changes the catalog.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import uuid_utils

from fennflow.backends import Commit, ObjectKey, Record, TransactionToken
from fennflow.connectors import Location
from fennflow.engine.callbacks import notify
from fennflow.engine.concurrency import run_all, shielded
from fennflow.engine.context import EngineContext
from fennflow.engine.differences import Policy, Verdict, agree, judge, refused, unreadable
from fennflow.engine.finish import finish
from fennflow.engine.garbage import HeadResult, describe, lock_free
from fennflow.engine.leases import Lease
from fennflow.engine.recovery import Recovery, Unsettled
from fennflow.engine.settle import Settler
from fennflow.engine.telemetry import log_event
from fennflow.engine.walking import Pair, is_key, objects, pairs
from fennflow.exceptions import (
    BaseConnectorException,
)
from fennflow.paths import StoragePath
from fennflow.reports import Difference, Finding, ReconcileAction, ReconcileReport

if TYPE_CHECKING:
    from fennflow.config import ReconcileConfig

KEPT_FINDINGS = 1000


def only_reports(settings: ReconcileConfig) -> bool:
    """Return whether nothing is changed in a catalog that has records."""
    return settings.strategy == "fill_if_empty" and settings.orphans == "report"


OnFinding = Callable[[Finding], object]
OnProgress = Callable[[ReconcileReport], object]


@dataclass(slots=True)
class Reconciler:
    """Reconciles the namespaces of an engine, by itself as `ReconcileConfig.frequency` says.

    Args:
        context: of the engine.
        recovery: takes over what could not be finished.
    """

    context: EngineContext
    recovery: Recovery
    _done: set[str] = field(default_factory=set[str])
    _locks: defaultdict[str, asyncio.Lock] = field(
        default_factory=lambda: defaultdict(asyncio.Lock)
    )

    async def ensure_reconciled(self, namespace: str, seen: set[str]) -> None:
        """Reconcile a namespace before its first use by the engine, or by a transaction.

        Args:
            namespace: which one.
            seen: what the transaction has prepared already.
        """
        self.recovery.namespaces.add(namespace)
        settings = self.context.config.reconcile
        done = seen if settings.frequency == "on_session_start" else self._done
        if settings.frequency == "never" or namespace in done:
            return
        async with self._locks[namespace]:
            if namespace not in done:
                try:
                    await self._run(namespace, settings)
                except Exception as error:
                    error.add_note(
                        f"This happened while the catalog was reconciled with {namespace} before "
                        "its first use, as ConfigDict(reconcile=ReconcileConfig(...)) says. Hold "
                        "UOW.lifespan() from the start of the program: then it happens there."
                    )
                    raise
                done.add(namespace)

    async def prepare_all(self, namespaces: Iterable[str], seen: set[str]) -> None:
        """Reconcile namespaces before they are used; a store that fails is asked again at its first use.

        Args:
            namespaces: which ones.
            seen: see `prepare`.
        """
        for namespace in namespaces:
            with suppress(BaseConnectorException):  # the first use raises what it meets
                await self.ensure_reconciled(namespace, seen)

    async def _run(self, namespace: str, settings: ReconcileConfig) -> None:
        if only_reports(settings) and await self._has_records(namespace):
            return
        report = await self.reconcile(namespace, settings)
        if report.differences:
            found = ", ".join(f"{count} {kind}" for kind, count in report.differences.items())
            done = ", ".join(f"{count} {kind}" for kind, count in report.actions.items())
            log_event(
                logging.INFO,
                "The catalog was reconciled with %s: %s; %s",
                namespace,
                found,
                done or "reported",
                rule="reconcile",
            )
        if Difference.OTHER_CATALOG in report.differences:
            catalogs = {each.catalog_id for each in report.findings} - {None}
            log_event(
                logging.WARNING,
                "%d objects in %s belong to other catalogs (%s) and were left alone. If such a "
                "catalog is lost, name it in ReconcileConfig(adopt_catalogs=...).",
                report.differences[Difference.OTHER_CATALOG],
                namespace,
                ", ".join(sorted(map(str, catalogs))),
                rule="reconcile",
            )

    async def _has_records(self, namespace: str) -> bool:
        return bool(await self.context.backend.scan(namespace, prefix="", start="", limit=1))

    async def reconcile(
        self,
        namespace: str,
        settings: ReconcileConfig,
        *,
        on_finding: OnFinding | None = None,
        on_progress: OnProgress | None = None,
    ) -> ReconcileReport:
        """Compare a bucket with the catalog, and do about the differences what the settings say.

        Raises:
            ReconcileFailedException: a temporary file cannot be written.
            BaseConnectorException: the store refused or cannot be reached.
        """
        run = _Run(self, namespace, settings, filling=not await self._has_records(namespace))
        differing: list[str] = []
        walked = 0
        walk = (
            self._filling(namespace)
            if run.filling
            else pairs(self.context, namespace, "", settings.batch_size)
        )
        async with aclosing(walk) as walking:
            async for key, stored, record in walking:
                walked += 1
                run.objects += stored is not None
                run.records += record is not None
                if agree(stored, record):
                    pass
                elif record is None and not is_key(key):
                    run.refuse(key)
                else:
                    differing.append(key)
                if len(differing) == settings.batch_size:
                    await run.examine(differing)
                    await run.emit(on_finding)
                    differing.clear()
                if on_progress is not None and walked % settings.batch_size == 0:
                    await notify(on_progress, run.report())
        await run.examine(differing)
        await run.emit(on_finding)
        return run.report()

    async def _filling(self, namespace: str) -> AsyncGenerator[Pair]:
        """Walk a bucket of which the catalog has no record."""
        async with aclosing(objects(self.context, namespace, "")) as listing:
            async for stored in listing:
                yield stored.location.key, stored, None


@dataclass(slots=True)
class _Run:
    """One reconciliation of one namespace.

    Args:
        reconciler: with connector and backend.
        namespace: which one.
        settings: what to do about differences.
        filling: whether the catalog had no record of the namespace at the start.
    """

    reconciler: Reconciler
    namespace: str
    settings: ReconcileConfig
    filling: bool
    objects: int = 0
    records: int = 0
    _differences: Counter[Difference] = field(default_factory=Counter[Difference])
    _actions: Counter[ReconcileAction] = field(default_factory=Counter[ReconcileAction])
    _findings: list[Finding] = field(default_factory=list[Finding])
    _not_emitted: list[Finding] = field(default_factory=list[Finding])

    def report(self) -> ReconcileReport:
        """Return how far it got."""
        return ReconcileReport(
            objects=self.objects,
            records=self.records,
            differences=dict(self._differences),
            actions=dict(self._actions),
            findings=tuple(self._findings),
        )

    async def emit(self, on_finding: OnFinding | None) -> None:
        """Count new findings, and pass them to the caller."""
        for finding in self._not_emitted:
            self._differences[finding.difference] += 1
            if finding.action is not None:
                self._actions[finding.action] += 1
            if len(self._findings) < KEPT_FINDINGS:
                self._findings.append(finding)
            if on_finding is not None:
                await notify(on_finding, finding)
        self._not_emitted.clear()

    def refuse(self, key: str) -> None:
        """Note an object whose key no record can have, nor any statement to a database."""
        self._not_emitted.append(refused(ObjectKey(self.namespace, key)).finding)

    async def examine(self, keys: Sequence[str]) -> None:
        """Look at keys once more, and do what is to be done about them."""
        wanted = [ObjectKey(self.namespace, key) for key in keys]
        if not wanted:
            return
        if not self.filling and only_reports(self.settings):
            stored = await self._heads(wanted)
            records = await self.reconciler.context.backend.records(wanted)
            verdicts = await self._judge(stored, records, "")
            self._not_emitted += [verdict.finding for verdict in verdicts]
            return
        work, cancellation = await shielded(
            self._change(wanted), grace=lambda: self.reconciler.context.config.compensation_timeout
        )
        if cancellation is not None:
            raise cancellation
        self._not_emitted += work.result()

    async def _change(self, keys: Sequence[ObjectKey]) -> list[Finding]:
        """Change the catalog under the keys' locks, in a transaction like those of users."""
        context = self.reconciler.context
        lease = Lease(TransactionToken(str(uuid_utils.uuid7())))
        busy: list[ObjectKey] = []
        settler = Settler(context, lease)
        try:
            records = await lock_free(context.leases, lease, keys, busy)
            stored = await self._heads([key for key in keys if key not in set(busy)])
            verdicts = await self._judge(stored, records, lease.token.transaction_id)
            commit = Commit(
                records=[each.record for each in verdicts if each.record is not None],
                removed=[
                    ObjectKey(self.namespace, each.finding.path)
                    for each in verdicts
                    if each.finding.action is ReconcileAction.REMOVED
                ],
                steps=[each.deletion for each in verdicts if each.deletion is not None],
            )
            if len(busy) < len(keys):
                await context.backend.commit(lease.token, commit)
            if commit.steps:
                await finish(settler, commit.steps, keys=set(keys).difference(busy))
            context.leases.release(lease)
        except BaseException:
            self.reconciler.recovery.add(
                Unsettled(lease=lease, undo=(), late_writes=(), progress=settler.progress)
            )
            raise
        return [
            *(verdict.finding for verdict in verdicts),
            *(Finding(key.namespace, StoragePath(key.key), Difference.BUSY) for key in busy),
        ]

    async def _heads(self, keys: Sequence[ObjectKey]) -> dict[ObjectKey, HeadResult]:
        context = self.reconciler.context

        async def head(key: ObjectKey) -> HeadResult:
            return await describe(context, key.namespace, Location(key.key))

        found = await run_all(context.config.max_concurrency, head, keys)
        return dict(zip(keys, found, strict=True))

    async def _judge(
        self,
        stored: Mapping[ObjectKey, HeadResult],
        records: Mapping[ObjectKey, Record],
        transaction_id: str,
    ) -> list[Verdict]:
        config = self.reconciler.context.config
        policy = Policy(
            settings=self.settings,
            filling=self.filling,
            dead_before=time.time() - config.max_transaction_age,
            transaction_id=transaction_id,
            catalog_id=self.reconciler.context.backend.catalog_id,
        )
        late_writes = await self.reconciler.context.backend.late_writes(list(stored))
        verdicts: list[Verdict | None] = []
        for seq, (key, there) in enumerate(stored.items(), 1):
            if isinstance(there, BaseConnectorException):
                _warn_of(key, there)
                verdicts.append(unreadable(key))
                continue
            record = records.get(key)
            verdicts.append(judge(key, there, record, policy, seq=seq, late_writes=late_writes))
        return [verdict for verdict in verdicts if verdict is not None]


def _warn_of(key: ObjectKey, error: BaseConnectorException) -> None:
    log_event(
        logging.WARNING,
        "%r in %s cannot be read and was skipped: %s",
        key.key,
        key.namespace,
        error,
        rule="reconcile",
        key=f"{key.namespace}/{key.key}",
    )
