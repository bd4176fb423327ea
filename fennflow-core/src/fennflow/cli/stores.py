"""Stores given by a URL: a bucket to measure, or a bucket that holds its own catalog."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import typer

from fennflow import backends, connectors, plugins
from fennflow.config import ConfigDict, ConnectorConfig, ReconcileConfig
from fennflow.connectors import Connector
from fennflow.engine.measuring import Check, measure
from fennflow.exceptions import ConfigException, IncompleteListingException
from fennflow.printable import without_credentials
from fennflow.repositories import CrudRepository, RepoField
from fennflow.uow import UnitOfWork

DEFAULT_CATALOG = "default"


def config_for(url: str, endpoint: str | None) -> tuple[ConnectorConfig, str]:
    """Return the config of a connector, and the namespace, that a URL names.

    Args:
        url: `s3://bucket`, or what obstore takes, such as `gs://bucket` or `file:///srv/files/bucket`.
        endpoint: of a server that speaks S3; by default that of the environment.

    Raises:
        typer.BadParameter: it names no bucket, or a directory that does not exist.
        ConfigException: the connector cannot use it, or is not installed.
    """
    above, _, namespace = url.rstrip("/").rpartition("/")
    scheme, separator, _ = url.partition("://")
    # The URL of an S3 bucket has no further path.
    names_bucket = scheme != "s3" or above == "s3:/"
    # Credentials or a query may be part of it: then it must not be shown as a name.
    odd = ":" if scheme == "file" else ":@?"
    if not (separator and scheme and names_bucket and namespace) or not set(odd).isdisjoint(
        namespace
    ):
        shown = without_credentials(url)
        message = f"{shown!r} names no bucket, such as s3://bucket or file:///srv/files/bucket."
        raise typer.BadParameter(message)
    if scheme == "s3":
        return connectors.S3ConnectorConfig(endpoint_url=endpoint), namespace
    if endpoint is not None:
        message = "--endpoint is only for s3://."
        raise typer.BadParameter(message)
    config = connectors.ObstoreConnectorConfig(url=f"{above}/")
    # The connector would create it, but a mistyped name should leave nothing behind.
    if scheme == "file" and not (Path(unquote(urlsplit(config.url).path)) / namespace).is_dir():
        message = f"There is no directory {without_credentials(url)}."
        raise typer.BadParameter(message)
    return config, namespace


async def measured(url: str, endpoint: str | None) -> Sequence[Check]:
    """Open a connector for a URL, and measure the store."""
    config, namespace = config_for(url, endpoint)
    settings = ConfigDict(connector=config)
    async with _opened(settings) as connector:
        return await measure(connector, namespace, settings.reserved_prefix)


async def kept_in(url: str) -> type[UnitOfWork]:
    """Return a unit of work on the catalog that a bucket holds.

    Args:
        url: like that of `config_for`; the name of the catalog follows a `#`, if it is not `default`.

    Raises:
        typer.BadParameter: it names no bucket.
        ConfigException: the bucket holds no catalog of that name, or a package is not installed.
    """
    url, _, name = url.partition("#")
    connector, namespace = config_for(url, None)
    backend = backends.BucketBackendConfig(namespace=namespace, name=name or DEFAULT_CATALOG)
    # Nothing is recorded automatically: it is not known here which objects are the application's.
    # Nothing is finished, either: the log may be from a stranger, and may name other buckets.
    settings = ConfigDict(
        connector=connector,
        backend=backend,
        reconcile=ReconcileConfig(frequency="never"),
        recovery_interval=None,
    )
    async with _opened(settings) as opened:
        await _check_catalog(opened, settings, url, namespace, backend.name)
    field = RepoField(CrudRepository, namespace=namespace)
    return type("UOW", (UnitOfWork,), {"files": field, "config": settings})


@asynccontextmanager
async def _opened(settings: ConfigDict) -> AsyncGenerator[Connector]:
    config = settings.connector
    connector = plugins.registry().connector_for(config).factory(config, settings)
    await connector.open()
    try:
        yield connector
    finally:
        await connector.aclose()


async def _check_catalog(
    connector: Connector, settings: ConfigDict, url: str, namespace: str, name: str
) -> None:
    """Raise unless there is a catalog: opening the backend would create one."""
    above = f"{settings.reserved_prefix}/catalog/"
    if await _first(connector, namespace, f"{above}{name}/") is not None:
        return
    found = await _first(connector, namespace, above)
    message = f"{without_credentials(url)} holds no catalog {name!r} of a BucketBackendConfig"
    if found is None:
        message += (
            f": nothing is below {above}. If the catalog is in a database, name the unit of work "
            "instead (MODULE:CLASS)."
        )
    else:
        other = found.removeprefix(above).partition("/")[0]
        message += f", but one of another name: write {without_credentials(url)}#{other}."
    raise ConfigException(message)


async def _first(connector: Connector, namespace: str, prefix: str) -> str | None:
    """Return the first key below a prefix."""
    try:
        stored = await anext(connector.list(namespace, prefix), None)
    except IncompleteListingException:
        return None  # a prefix that cannot be listed cannot hold a catalog
    return None if stored is None else stored.location.key
