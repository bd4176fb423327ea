"""Deletes files when the row that names them is deleted or names another file.

Inside `atomic()` the deletion commits with the row. Outside of it the file is deleted after the row
has changed: a crash in between leaves a file that no row names, but never a row without its file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any, cast

from django.apps import apps
from django.db import connections, router
from django.db.models import FileField, Model, QuerySet

from fennflow.exceptions import KeyException
from fennflow_django.storage import FennFlowStorage

_ROWS: Any = QuerySet  # without a type of rows
_BEFORE = "_fennflow_before"
"""The attribute of a model instance for the files of its row, while that is being changed."""


def before_save(
    sender: type[Model],
    instance: Model,
    raw: bool = False,  # noqa: FBT001, FBT002 - as Django calls it
    using: str = "default",
    update_fields: Collection[str] | None = None,
    **_: object,
) -> None:
    """Note the files that a row names before it is changed."""
    vars(instance).pop(_BEFORE, None)
    if raw or instance.pk is None:
        return
    fields = [
        field
        for field in _fields(sender, using)
        if update_fields is None or field.name in update_fields or field.attname in update_fields
    ]
    _note(instance, fields, using)


def before_delete(sender: type[Model], instance: Model, using: str, **_: object) -> None:
    """Note the files that a row names before it is deleted."""
    _note(instance, _fields(sender, using), using)


def _note(instance: Model, fields: list[FileField], using: str) -> None:
    # The instance may name other files than the row: it may be outdated, or not saved.
    if not fields:
        return
    connection = connections[using]
    rows: Any = _ROWS(type(instance), using=using).filter(pk=instance.pk)
    if connection.in_atomic_block and connection.features.has_select_for_update:
        # If two transactions replace it, the later one has to see what the earlier one wrote.
        rows = rows.select_for_update()
    row = rows.values_list(*(field.attname for field in fields)).first()
    if row is not None:
        vars(instance)[_BEFORE] = list(zip(fields, row, strict=True))


def after_save(sender: type[Model], instance: Model, using: str = "default", **_: object) -> None:
    """Delete files that the row no longer names."""
    del sender
    before: list[tuple[FileField, str]] = vars(instance).pop(_BEFORE, [])
    for field, name in before:
        if name and name != getattr(instance, field.attname).name:
            _delete(field, name, using)


def after_delete(sender: type[Model], instance: Model, using: str = "default", **_: object) -> None:
    """Delete the files that a row named."""
    del sender
    before: list[tuple[FileField, str]] = vars(instance).pop(_BEFORE, [])
    for field, name in before:
        if name:
            _delete(field, name, using)


def _fields(model: type[Model], using: str) -> list[FileField]:
    """Return the fields whose files are deleted when they are no longer used.

    If the rows are in another database than the catalog, files are kept: they would not commit with
    the row.
    """
    return [
        field
        for field, storage in _files(model)
        if storage.delete_unused and storage.using == using
    ]


def _files(model: type[Model]) -> Iterator[tuple[FileField, FennFlowStorage]]:
    for field in model._meta.concrete_fields:  # noqa: SLF001 - documented
        # A storage that is set up at first use has its class only then.
        if isinstance(field, FileField) and isinstance(field.storage, FennFlowStorage):
            yield field, field.storage


def _delete(field: FileField, name: str, using: str) -> None:
    """Delete a file unless another row names it, too."""
    storage = cast("FennFlowStorage", field.storage)
    place = storage.unit_of_work
    for model in apps.get_models(include_auto_created=True):
        for other, its in _files(model):
            if other.model is model and its.unit_of_work is place:
                for alias in _databases(model, using):
                    # Not with a manager, which may hide rows.
                    rows: Any = _ROWS(model, using=alias)
                    if rows.filter(**{other.attname: name}).exists():
                        return
    # A row may hold any text: one that cannot be the name of a file names none.
    with suppress(KeyException):
        storage.delete(name)


def _databases(model: type[Model], using: str) -> Iterator[str]:
    """Return the databases that may have rows of a model."""
    for alias in {using, router.db_for_write(model)}:
        tables = connections[alias].introspection.table_names
        if router.allow_migrate_model(alias, model) and (
            # The table of an unmanaged model may not exist.
            model._meta.managed or model._meta.db_table in tables(include_views=True)  # noqa: SLF001 - documented
        ):
            yield alias
