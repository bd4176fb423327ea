"""Reconciliation: compares a bucket with the catalog, and corrects one or the other as configured.

Bucket and catalog are read together, in the order in which the store lists and in constant memory.
Differences are examined again in batches. Corrections are made under the locks of the keys and through
the journal, like every other change of the catalog.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import uuid_utils

from fennflow.backends import Area, Commit, ObjectKey, Record, TransactionToken, WriteId
from fennflow.connectors import Location
from fennflow.engine.adopting import Adoption, new_fill, unfinished
from fennflow.engine.catalogs import Registry
from fennflow.engine.concurrency import run_all, shielded
from fennflow.engine.context import EngineContext
from fennflow.engine.differences import Policy, Verdict, agree, judge, refused, unreadable
from fennflow.engine.finish import Finisher
from fennflow.engine.garbage import HeadResult, describe, lock_free
from fennflow.engine.hidden import note_hidden
from fennflow.engine.leases import Lease
from fennflow.engine.recovery import Recovery, Unsettled
from fennflow.engine.tally import OnFinding, OnProgress, Tally, warn_of_unreadable
from fennflow.engine.walking import is_key, pairs
from fennflow.exceptions import (
    BaseConnectorException,
    IncompleteListingException,
    ReconcileFailedException,
)
from fennflow.paths import StoragePath
from fennflow.reports import Difference, Finding, ReconcileAction, ReconcileReport
from fennflow.telemetry import log_event

if TYPE_CHECKING:
    from fennflow.config import ReconcileConfig


def only_reports(settings: ReconcileConfig) -> bool:
    """Return whether nothing is changed in a catalog that has records."""
    return settings.strategy == "fill_if_empty" and settings.orphans == "report"


@dataclass(slots=True)
class Reconciler:
    """Reconciles the areas of an engine, automatically according to `ReconcileConfig.frequency`.

    Args:
        context: of the engine.
        recovery: takes over work that could not be finished.
        registry: the notes of this catalog in buckets.
        done: areas that were reconciled for this engine.
        turns: held while an area is reconciled before its first use.
    """

    context: EngineContext
    recovery: Recovery
    registry: Registry
    done: set[Area] = field(default_factory=set[Area])
    turns: defaultdict[Area, asyncio.Lock] = field(
        default_factory=lambda: defaultdict(asyncio.Lock)
    )

    async def prepare(self, area: Area) -> None:
        """Reconcile an area now if `ReconcileConfig.frequency` says so.

        Raises:
            ReconcileFailedException: its first reading was interrupted, and the configuration does
                not allow resuming it here.
        """
        settings = self.context.config.reconcile
        begun = await unfinished(self.context, area)
        if settings.frequency == "never":
            if begun:
                message = (
                    f"The first reading of {begun[0].area} was interrupted, so not all files of "
                    f"{area} are in the catalog yet. Run fennflow adopt MODULE:UOW to resume it."
                )
                raise ReconcileFailedException(message)
            return
        if not begun and only_reports(settings) and await self._has_records(area):
            return
        report = await self.reconcile(area, settings)
        if report.differences:
            found = ", ".join(f"{count} {kind}" for kind, count in report.differences.items())
            done = ", ".join(f"{count} {kind}" for kind, count in report.actions.items())
            log_event(
                logging.INFO,
                "The catalog was reconciled with %s: %s; %s",
                str(area),
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
                str(area),
                ", ".join(sorted(map(str, catalogs))),
                rule="reconcile",
            )

    async def _has_records(self, area: Area) -> bool:
        namespace, prefix = area
        return bool(await self.context.backend.scan(namespace, prefix=prefix, start="", limit=1))

    async def reconcile(
        self,
        area: Area,
        settings: ReconcileConfig,
        *,
        on_finding: OnFinding | None = None,
        on_progress: OnProgress | None = None,
    ) -> ReconcileReport:
        """Compare a bucket with the catalog, and treat the differences according to the settings.

        If the catalog has no record of the area, all its objects are recorded.

        Raises:
            ReconcileFailedException: a temporary file cannot be written.
            BaseConnectorException: the store refused or cannot be reached.
        """
        tally = Tally(on_finding, on_progress)
        while True:
            begun = await unfinished(self.context, area)
            if not begun and await self._has_records(area):
                break
            fill = begun[0] if begun else new_fill(area)
            adoption = Adoption(self.context, self.registry, settings, fill, bool(begun), tally)
            if await adoption.run():
                return tally.report()
            # Another process has finished or started it.
        tally.begin()
        run = _Run(self, area.namespace, settings, tally)
        differing: list[str] = []
        walked = 0
        incomplete: list[IncompleteListingException] = []
        walk = pairs(
            self.context, area.namespace, area.prefix, settings.batch_size, incomplete=incomplete
        )
        async with aclosing(walk) as walking:
            async for key, stored, record in walking:
                walked += 1
                tally.objects += stored is not None
                tally.records += record is not None
                if agree(stored, record):
                    pass
                elif record is None and not is_key(key):
                    tally.add(refused(ObjectKey(area.namespace, key)).finding)
                else:
                    differing.append(key)
                if len(differing) == settings.batch_size:
                    await run.examine(differing)
                    await tally.pass_on()
                    differing.clear()
                if walked % settings.batch_size == 0:
                    await tally.progress()
        await run.examine(differing)
        tally.add_unlisted(area, incomplete)
        await tally.pass_on()
        if run.too_young:
            log_event(
                logging.WARNING,
                "%d objects in %s differ from the catalog and were only reported: their transactions "
                "began less than max_transaction_age (%s s) ago, so they might still commit. Reconcile "
                "again when they are older. After a restore, when nothing else runs, reconcile with a "
                "smaller max_transaction_age.",
                run.too_young,
                str(area),
                self.context.config.max_transaction_age,
                rule="reconcile",
            )
        await note_hidden(self.context, area, tally.differences)
        return tally.report()


@dataclass(slots=True)
class UsedAreas:
    """The areas that a unit of work can see; each is reconciled before its first use.

    Args:
        reconciler: of the engine.
        areas: all of them.
    """

    reconciler: Reconciler
    areas: Sequence[Area]
    _done: set[Area] = field(default_factory=set[Area])

    def of(self, namespace: str) -> list[Area]:
        """Return the areas of one bucket."""
        return [area for area in self.areas if area.namespace == namespace]

    async def ensure_reconciled(self, areas: Iterable[Area]) -> None:
        """Reconcile areas before their first use by the engine, or by this unit of work.

        Raises:
            ReconcileFailedException: as for `Reconciler.prepare`.
        """
        reconciler = self.reconciler
        always = reconciler.context.config.reconcile.frequency == "on_session_start"
        done = self._done if always else reconciler.done
        for area in areas:
            reconciler.recovery.namespaces.add(area.namespace)
            if area in done:
                continue
            async with reconciler.turns[area]:
                if area not in done:
                    try:
                        await reconciler.prepare(area)
                    except Exception as error:
                        error.add_note(
                            f"This happened while the catalog was reconciled with {area} before "
                            "its first use, as ConfigDict(reconcile=ReconcileConfig(...)) says. Hold "
                            "UOW.lifespan() from the start of the program, or run fennflow adopt "
                            "MODULE:UOW: then it happens there. The records made so far are kept: the "
                            "next attempt continues, and no reader sees a part of them."
                        )
                        raise
                    done.add(area)

    async def prepare_all(self) -> None:
        """Reconcile all areas before they are used; if a store fails, retry at its first use.

        Raises:
            BaseConnectorException: the first reading of an area has begun, and failed.
        """
        for area in self.areas:
            try:
                await self.ensure_reconciled([area])
            except BaseConnectorException:
                if await unfinished(self.reconciler.context, area):
                    raise
                # The first use raises the error.


@dataclass(slots=True)
class _Run:
    """One comparison of one area.

    Args:
        reconciler: has connector and backend.
        namespace: of the area.
        settings: what to do about differences.
        tally: counts the findings.
        too_young: objects that were left alone, since their transactions may still commit.
    """

    reconciler: Reconciler
    namespace: str
    settings: ReconcileConfig
    tally: Tally
    too_young: int = 0

    async def examine(self, keys: Sequence[str]) -> None:
        """Examine keys again, and correct them as configured."""
        wanted = [ObjectKey(self.namespace, key) for key in keys]
        if not wanted:
            return
        if only_reports(self.settings):
            stored = await self._heads(wanted)
            records = await self.reconciler.context.backend.records(wanted)
            verdicts = await self._judge(stored, records, "")
            for verdict in verdicts:
                self.tally.add(verdict.finding)
            return
        work, cancellation = await shielded(
            self._change(wanted), grace=lambda: self.reconciler.context.config.compensation_timeout
        )
        if cancellation is not None:
            raise cancellation
        for finding in work.result():
            self.tally.add(finding)

    async def _change(self, keys: Sequence[ObjectKey]) -> list[Finding]:
        """Change the catalog under the keys' locks, in a transaction like a user's."""
        context = self.reconciler.context
        lease = Lease(TransactionToken(str(uuid_utils.uuid7())))
        busy: list[ObjectKey] = []
        finisher = Finisher(context, lease)
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
                await finisher.finish(commit.steps, keys=set(keys).difference(busy))
            context.leases.release(lease)
        except BaseException:
            self.reconciler.recovery.add(
                Unsettled(lease=lease, undo=(), late_writes=(), progress=finisher.progress)
            )
            raise
        retained = {StoragePath(each.key) for each in finisher.retained}
        findings = [verdict.finding for verdict in verdicts]
        return [
            *(replace(each, action=None) if each.path in retained else each for each in findings),
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
            filling=False,
            dead_before=time.time() - config.max_transaction_age,
            catalog_id=self.reconciler.context.backend.catalog_id,
        )
        late_writes = await self.reconciler.context.backend.late_writes(list(stored))
        verdicts: list[Verdict | None] = []
        for seq, (key, there) in enumerate(stored.items(), 1):
            if isinstance(there, BaseConnectorException):
                warn_of_unreadable(key, there)
                verdicts.append(unreadable(key, there))
                continue
            record = records.get(key)
            write = WriteId(transaction_id, seq)
            verdicts.append(judge(key, there, record, policy, write=write, late_writes=late_writes))
        found = [verdict for verdict in verdicts if verdict is not None]
        self.too_young += sum(verdict.too_young for verdict in found)
        return found
