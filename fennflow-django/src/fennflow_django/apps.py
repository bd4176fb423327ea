"""The app for `INSTALLED_APPS`."""

from __future__ import annotations

from collections.abc import Iterable

from django.apps import AppConfig, apps
from django.core import checks
from django.db import connections
from django.db.models import FileField, signals
from typing_extensions import override

from fennflow_django import unused


def _migrated(using: str, **_: object) -> None:
    from fennflow_django.upkeep import complete_catalogs  # when there are models

    complete_catalogs(connections[using])


def _checked(**_: object) -> Iterable[checks.CheckMessage]:
    from fennflow_django.upkeep import check_storages  # when there are models

    return check_storages()


class FennFlowConfig(AppConfig):
    """Creates the catalog by a migration, and deletes files that no row names any more."""

    name = "fennflow_django"
    verbose_name = "FennFlow"

    @override
    def ready(self) -> None:
        """Connect the signals of models with files and of `migrate`; register the check of `STORAGES`."""
        checks.register(_checked)
        # The signal is sent for every app with models; this handles the last one.
        last = [each for each in apps.get_app_configs() if each.models_module is not None][-1:]
        for app in last:
            signals.post_migrate.connect(_migrated, app, dispatch_uid="fennflow")
        for model in apps.get_models(include_auto_created=True):
            if any(isinstance(field, FileField) for field in model._meta.concrete_fields):  # noqa: SLF001 - documented
                name = f"fennflow {model._meta.label}"  # noqa: SLF001 - documented
                signals.pre_save.connect(unused.before_save, model, dispatch_uid=name)
                signals.pre_delete.connect(unused.before_delete, model, dispatch_uid=name)
                signals.post_save.connect(unused.after_save, model, dispatch_uid=name)
                signals.post_delete.connect(unused.after_delete, model, dispatch_uid=name)
