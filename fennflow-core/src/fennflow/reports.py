"""What maintenance tells: how a catalog and its buckets differ, and what was done about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fennflow.paths import StoragePath

__all__ = ["Difference", "Finding", "ReconcileAction", "ReconcileReport"]


class Difference(StrEnum):
    """How an object and its record differ."""

    UNKNOWN = "unknown"
    """An object that FennFlow did not write, and no record."""

    ORPHAN = "orphan"
    """An object that FennFlow wrote, and no record: its session died, or its catalog is lost."""

    MISSING = "missing"
    """A record, and no object."""

    CHANGED = "changed"
    """An object with another ETag than its record has."""

    REFUSED = "refused"
    """An object whose key breaks FennFlow's key rules, so that no record can have it."""

    BUSY = "busy"
    """A key that a unit of work was writing; it was left alone."""


class ReconcileAction(StrEnum):
    """What reconciliation did."""

    INSERTED = "inserted"
    UPDATED = "updated"
    REMOVED = "removed"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference between a bucket and the catalog.

    Args:
        namespace: the bucket.
        path: in it.
        difference: what is wrong.
        action: what was done; None if it was only reported.
    """

    namespace: str
    path: StoragePath
    difference: Difference
    action: ReconcileAction | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileReport:
    """How a reconciliation went.

    Args:
        objects: how many were listed.
        records: how many they were compared with.
        differences: how many of each kind were found; kinds that were not found are left out.
        actions: how many of each kind were taken.
        findings: the first thousand; `on_finding` gets all of them.
    """

    objects: int = 0
    records: int = 0
    differences: Mapping[Difference, int] = field(default_factory=dict[Difference, int])
    actions: Mapping[ReconcileAction, int] = field(default_factory=dict[ReconcileAction, int])
    findings: Sequence[Finding] = ()
