"""The plugin of this package; imports no driver, since discovery imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fennflow.hookspecs import ConnectorPlugin, hookimpl
from fennflow_obstore.config import ObstoreConnectorConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fennflow.config import ConfigDict
    from fennflow.connectors import Connector


@hookimpl
def fennflow_connectors() -> Iterable[ConnectorPlugin]:
    """Return the connector on obstore."""
    return [ConnectorPlugin("obstore", ObstoreConnectorConfig, _new_connector)]


def _new_connector(config: ObstoreConnectorConfig, settings: ConfigDict) -> Connector:
    from fennflow_obstore.connector import ObstoreConnector
    from fennflow_obstore.local import LocalConnector

    kind = LocalConnector if config.scheme == "file" else ObstoreConnector
    return kind(config, reserved_prefix=settings.reserved_prefix)
