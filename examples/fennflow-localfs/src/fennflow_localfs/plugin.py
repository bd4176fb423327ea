"""What the entry point names."""

from __future__ import annotations

from collections.abc import Iterable

from fennflow.config import ConfigDict
from fennflow.connectors import Connector
from fennflow.hookspecs import ConnectorPlugin, hookimpl
from fennflow_localfs.config import LocalFsConnectorConfig

FENNFLOW_HOOKSPEC_VERSION = 1


def new_connector(config: LocalFsConnectorConfig, _settings: ConfigDict) -> Connector:
    """Import what does the work, once it is needed: discovery imports every plugin."""
    from fennflow_localfs.connector import LocalFsConnector

    return LocalFsConnector(config)


@hookimpl
def fennflow_connectors() -> Iterable[ConnectorPlugin]:
    """Return the connector that this package brings."""
    return [ConnectorPlugin("localfs", LocalFsConnectorConfig, new_connector)]
