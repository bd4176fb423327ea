"""Counts the findings of a reconciliation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from fennflow.engine.callbacks import notify
from fennflow.engine.hidden import HIDING
from fennflow.paths import StoragePath
from fennflow.reports import Difference, Finding, ReconcileAction, ReconcileReport
from fennflow.telemetry import log_event

if TYPE_CHECKING:
    from fennflow.backends import Area, ObjectKey
    from fennflow.exceptions import BaseConnectorException, IncompleteListingException

KEPT_FINDINGS = 1000

OnFinding = Callable[[Finding], object]
OnProgress = Callable[[ReconcileReport], object]


@dataclass(slots=True)
class Tally:
    """Counts findings and passes them on.

    Args:
        on_finding: called with each difference, after what was done about it is durable.
        on_progress: called from time to time.
    """

    on_finding: OnFinding | None
    on_progress: OnProgress | None
    objects: int = 0
    records: int = 0
    differences: Counter[Difference] = field(default_factory=Counter[Difference])
    _actions: Counter[ReconcileAction] = field(default_factory=Counter[ReconcileAction])
    _findings: tuple[list[Finding], ...] = field(
        default_factory=lambda: tuple(list[Finding]() for _ in range(3))
    )
    _new: list[Finding] = field(default_factory=list[Finding])

    def begin(self) -> None:
        """Reset the counts of findings that each pass finds again."""
        self.objects = self.records = 0
        for kind in HIDING:
            self.differences.pop(kind, None)
        self._findings = tuple(
            [each for each in kept if each.difference not in HIDING] for kept in self._findings
        )

    def add(self, finding: Finding) -> None:
        """Add a finding; it counts from the next `pass_on` on."""
        self._new.append(finding)

    def add_unlisted(self, area: Area, incomplete: Sequence[IncompleteListingException]) -> None:
        """Add what could not be listed in an area, and log it."""
        for error in incomplete:
            log_event(
                logging.WARNING,
                "Files in %s that the catalog does not have may have been passed over. %s",
                str(area),
                error,
                rule="reconcile",
            )
            for prefix in error.prefixes:
                path = StoragePath(prefix)
                self.add(Finding(area.namespace, path, Difference.UNLISTED, reason=str(error)))

    async def pass_on(self) -> None:
        """Count new findings, which are durable by now, and call back."""
        for finding in self._new:
            self.differences[finding.difference] += 1
            if finding.action is not None:
                self._actions[finding.action] += 1
            kept = self._findings[_rank(finding)]
            if len(kept) < KEPT_FINDINGS:
                kept.append(finding)
            if self.on_finding is not None:
                await notify(self.on_finding, finding)
        self._new.clear()

    async def progress(self) -> None:
        """Report the progress."""
        if self.on_progress is not None:
            await notify(self.on_progress, self.report())

    def report(self) -> ReconcileReport:
        """Return the report so far."""
        return ReconcileReport(
            objects=self.objects,
            records=self.records,
            differences=dict(self.differences),
            actions=dict(self._actions),
            findings=tuple(chain.from_iterable(self._findings))[:KEPT_FINDINGS],
        )


def _rank(finding: Finding) -> int:
    """Order findings: those that need attention, those of other catalogs, those that were handled."""
    if finding.action is not None:
        return 2
    return int(finding.difference is Difference.OTHER_CATALOG)


def warn_of_unreadable(key: ObjectKey, error: BaseConnectorException) -> None:
    """Log that an object was skipped."""
    log_event(
        logging.WARNING,
        "%r in %s cannot be read and was skipped: %s",
        key.key,
        key.namespace,
        error,
        rule="reconcile",
        key=str(key),
    )
