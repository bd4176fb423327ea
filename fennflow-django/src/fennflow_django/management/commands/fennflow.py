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
"""The exit code of commands that say that something is wrong, as with the program `fennflow`."""


class Command(BaseCommand):
    """Does with every storage of FennFlow's what its name says."""

    help = (
        "recover: finish or roll back what crashed processes left. reconcile: compare catalog and "
        "bucket, and record all objects of a bucket that the catalog does not know. doctor: say what "
        "database and store can promise. Exit code 3 says that something is wrong, or was left for later."
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
            message = f"{name} is not a storage of FennFlow's. There are: {', '.join(found)}"
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
            message = f"Look at what is reported of {', '.join(wrong)}."
            raise CommandError(message, returncode=NEEDS_ATTENTION)


def _reports(
    uow: type[StorageUnitOfWork], action: str
) -> Sequence[Diagnosis | ReconcileReport | RecoveryReport]:
    """Do something with a storage, and return what is to be reported of it."""
    if action == "recover":
        return [uow.recover()]
    if action == "reconcile":
        return list(uow.reconcile().values())
    return [uow.diagnose()]
