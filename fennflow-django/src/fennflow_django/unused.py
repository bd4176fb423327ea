"""Deletes files when the row that names them is deleted, or names another one.

Inside `atomic()` that commits with the row. Outside of it the file goes after the row has changed: a
crash in between leaves a file that no row names, and never a row without its file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, cast

from django.apps import apps
from django.db import connections
from django.db.models import FileField, Model

from fennflow_django.storage import FennFlowStorage

_BEFORE = "_fennflow_before_save"
"""Name of the attribute of a model's instance that has what its row names, while it is saved."""


def before_save(
    sender: type[Model],
    instance: Model,
    raw: bool = False,  # noqa: FBT001, FBT002 - as Django calls it
    using: str = "default",
    update_fields: Collection[str] | None = None,
    **_: object,
) -> None:
    """Note which files the row names that is about to be changed."""
    vars(instance).pop(_BEFORE, None)
    if raw or instance.pk is None:
        return
    fields = [
        field
        for field in _fields(sender)
        if update_fields is None or field.name in update_fields or field.attname in update_fields
    ]
    if not fields:
        return
    connection = connections[using]
    rows: Any = sender._base_manager.using(using).filter(pk=instance.pk)  # noqa: SLF001 - documented
    if connection.in_atomic_block and connection.features.has_select_for_update:
        # Of two transactions that replace it, the later one has to see what the earlier one wrote.
        rows = rows.select_for_update()
    row = rows.values_list(*(field.attname for field in fields)).first()
    if row is not None:
        vars(instance)[_BEFORE] = list(zip(fields, row, strict=True))


def after_save(sender: type[Model], instance: Model, using: str = "default", **_: object) -> None:
    """Delete files that the row named before and does not any more."""
    del sender
    before: list[tuple[FileField, str]] = vars(instance).pop(_BEFORE, [])
    for field, name in before:
        if name and name != getattr(instance, field.attname).name:
            _delete(field, name, using)


def after_delete(sender: type[Model], instance: Model, using: str = "default", **_: object) -> None:
    """Delete the files that a row named."""
    for field in _fields(sender):
        name = getattr(instance, field.attname).name
        if name:
            _delete(field, name, using)


def _fields(model: type[Model]) -> list[FileField]:
    """Return the fields whose files are deleted when they are not used any more."""
    return [field for field, storage in _files(model) if storage.delete_unused]


def _files(model: type[Model]) -> Iterator[tuple[FileField, FennFlowStorage]]:
    for field in model._meta.concrete_fields:  # noqa: SLF001 - documented
        # A storage that is set up at first use says what it is when asked.
        if isinstance(field, FileField) and isinstance(field.storage, FennFlowStorage):
            yield field, field.storage


def _delete(field: FileField, name: str, using: str) -> None:
    """Delete a file unless another row names it, too."""
    storage = cast("FennFlowStorage", field.storage)
    place = storage.unit_of_work
    for model in apps.get_models(include_auto_created=True):
        if model._meta.proxy or not model._meta.managed:  # noqa: SLF001 - documented
            continue
        for other, its in _files(model):
            if other.model is model and its.unit_of_work is place:
                rows = model._base_manager.using(using)  # noqa: SLF001 - documented
                if rows.filter(**{other.attname: name}).exists():
                    return
    storage.delete(name)
