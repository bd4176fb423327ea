"""`manage.py fennflow`: recover, reconcile and diagnose the storages of `STORAGES`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from typing_extensions import override

from fennflow.exceptions import FennFlowException
from fennflow.printable import printable
from fennflow.reports import Diagnosis, ReconcileReport, RecoveryReport
from fennflow_django.storage import StorageUnitOfWork
from fennflow_django.upkeep import fennflow_storages

NEEDS_ATTENTION = 3
"""The exit code if something is wrong, as for the program `fennflow`."""


class Command(BaseCommand):
    """Runs recover, reconcile or doctor on every FennFlow storage."""

    help = (
        "recover: finish or roll back transactions of crashed processes. reconcile: compare catalog and "
        "bucket, and record all objects of a bucket that the catalog does not know. doctor: report what "
        "database and store guarantee. Exit code 3 means that something is wrong, or was left for later."
    )

    @override
    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", choices=["recover", "reconcile", "doctor"])
        parser.add_argument("--storage", help="one of STORAGES; all of FennFlow's by default")

    @override
    def handle(self, *args: Any, **options: Any) -> None:
        found = fennflow_storages()
        name: str | None = options["storage"]
        if name is not None and name not in found:
            message = f"{name} is not a FennFlow storage. FennFlow storages: {', '.join(found)}"
            raise CommandError(message)
        wrong: list[str] = []
        for each in [name] if name else found:
            try:
                reports = _reports(found[each].unit_of_work, options["action"])
            except FennFlowException as error:
                message = f"{each}: {error}"
                raise CommandError(message) from error
            for report in reports:
                self.stdout.write(printable(f"{each}: {report}"))
            if any(report.needs_attention for report in reports):
                wrong.append(each)
        if wrong:
            message = f"See the reports on {', '.join(wrong)}."
            raise CommandError(message, returncode=NEEDS_ATTENTION)


def _reports(
    uow: type[StorageUnitOfWork], action: str
) -> Sequence[Diagnosis | ReconcileReport | RecoveryReport]:
    """Run a command on a storage, and return its reports."""
    if action == "recover":
        return [uow.recover()]
    if action == "reconcile":
        return list(uow.reconcile().values())
    return [uow.diagnose()]
