"""The plugin of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fennflow.hookspecs import BackendPlugin, ConnectorPlugin, hookimpl
from fennflow_memory.backend import new_backend
from fennflow_memory.config import InMemoryBackendConfig, InMemoryConnectorConfig
from fennflow_memory.connector import new_connector

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def fennflow_connectors() -> Iterable[ConnectorPlugin]:
    """Return the memory connector."""
    return [ConnectorPlugin("memory", InMemoryConnectorConfig, new_connector)]


@hookimpl
def fennflow_backends() -> Iterable[BackendPlugin]:
    """Return the memory backend."""
    return [BackendPlugin("memory", InMemoryBackendConfig, new_backend)]
