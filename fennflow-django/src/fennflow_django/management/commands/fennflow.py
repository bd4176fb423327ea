"""`manage.py fennflow`: recover, reconcile and diagnose the storages of `STORAGES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from typing_extensions import override

from fennflow.exceptions import FennFlowException
from fennflow_django.upkeep import fennflow_storages


class Command(BaseCommand):
    """Does with every storage of FennFlow's what its name says."""

    help = (
        "recover: finish or roll back what crashed processes left. reconcile: compare catalog and "
        "bucket, and record all objects of a bucket that the catalog does not know. doctor: say what "
        "database and store can promise."
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
        for each in [name] if name else found:
            uow = found[each].unit_of_work
            action: str = options["action"]
            acts: dict[str, Callable[[], object]] = {
                "recover": uow.recover,
                "reconcile": uow.reconcile,
                "doctor": uow.diagnose,
            }
            try:
                report = acts[action]()
            except FennFlowException as error:
                message = f"{each}: {error}"
                raise CommandError(message) from error
            self.stdout.write(f"{each}: {report}")
