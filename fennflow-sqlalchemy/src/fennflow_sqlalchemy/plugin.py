"""The plugin of this package; imports no driver, since discovery imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fennflow.hookspecs import BackendPlugin, hookimpl
from fennflow_sqlalchemy.config import SqlalchemyBackendConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fennflow.backends import Backend
    from fennflow.config import ConfigDict


@hookimpl
def fennflow_backends() -> Iterable[BackendPlugin]:
    """Return the backend on SQLite and PostgreSQL."""
    return [BackendPlugin("sqlalchemy", SqlalchemyBackendConfig, _new_backend)]


def _new_backend(config: SqlalchemyBackendConfig, settings: ConfigDict) -> Backend:
    from fennflow_sqlalchemy.backend import SqlalchemyBackend

    return SqlalchemyBackend(
        config,
        late_write_period=settings.late_write_period,
        lease_ttl=settings.lease_ttl,
        lock_timeout=settings.lock_timeout,
    )
