"""The store that `fennflow doctor --store URL` measures."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

import typer

from fennflow import connectors, plugins
from fennflow.config import ConfigDict, ConnectorConfig
from fennflow.measuring import Check, measure


def config_for(url: str, endpoint: str | None) -> tuple[ConnectorConfig, str]:
    """Return the config of a connector, and the namespace, that a URL names.

    Args:
        url: `s3://bucket`, or what obstore takes, such as `gs://bucket` or `file:///srv/files/bucket`.
        endpoint: of a server that speaks S3; by default that of the environment.

    Raises:
        typer.BadParameter: it names no bucket.
        ConfigException: the connector cannot use it, or is not installed.
    """
    above, _, namespace = url.rstrip("/").rpartition("/")
    scheme = urlsplit(url).scheme
    if not scheme or not namespace or ":" in namespace:
        message = f"{url!r} names no bucket, such as s3://bucket or file:///srv/files/bucket."
        raise typer.BadParameter(message)
    if scheme == "s3":
        return connectors.S3ConnectorConfig(endpoint_url=endpoint), namespace
    if endpoint is not None:
        message = "--endpoint is for s3:// alone."
        raise typer.BadParameter(message)
    return connectors.ObstoreConnectorConfig(url=f"{above}/"), namespace


async def measured(url: str, endpoint: str | None) -> Sequence[Check]:
    """Open a connector for a URL, and measure the store."""
    config, namespace = config_for(url, endpoint)
    settings = ConfigDict(connector=config)
    connector = plugins.registry().connector_for(config).factory(config, settings)
    await connector.open()
    try:
        return await measure(connector, namespace, settings.reserved_prefix)
    finally:
        await connector.aclose()
