"""Units of work without `async`: `with UOW.sync() as uow`.

`fennflow.sync.interface` and `fennflow.sync.repositories` are generated from the asynchronous
interface by `FENNFLOW_UPDATE_INTERFACE=1 pytest tests/meta/test_sync_interface.py`.
"""

from __future__ import annotations

from types import new_class
from typing import TYPE_CHECKING, Any, cast

from fennflow.repositories.fields import fields_of
from fennflow.sync.interface import SyncUnitOfWork
from fennflow.sync.repositories import SyncRepository
from fennflow.sync.streams import SyncStream
from fennflow.sync.writers import SyncWriter

if TYPE_CHECKING:
    from fennflow.uow import UnitOfWork

__all__ = ["SyncRepository", "SyncStream", "SyncUnitOfWork", "SyncWriter"]


class AnyUnitOfWork(SyncUnitOfWork):
    """The type of `UOW.sync()`: it has the repositories of UOW, which type checkers do not know."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> SyncRepository[Any]: ...


def sync_of(cls: type[UnitOfWork]) -> type[AnyUnitOfWork]:
    """Return the class without `async` that has the repositories of a unit of work."""
    members = {**fields_of(cls), "config": cls.config}
    made = new_class(cls.__name__, (AnyUnitOfWork,), {"of": cls}, lambda body: body.update(members))
    return cast("type[AnyUnitOfWork]", made)
