"""The plugin of this package; imports no driver, since discovery imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fennflow.hookspecs import ConnectorPlugin, hookimpl
from fennflow_s3.config import S3ConnectorConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fennflow.config import ConfigDict
    from fennflow.connectors import Connector


@hookimpl
def fennflow_connectors() -> Iterable[ConnectorPlugin]:
    """Return the S3 connector."""
    return [ConnectorPlugin("s3", S3ConnectorConfig, _new_connector)]


def _new_connector(config: S3ConnectorConfig, settings: ConfigDict) -> Connector:
    from fennflow_s3.connector import S3Connector

    return S3Connector(config, reserved_prefix=settings.reserved_prefix)
