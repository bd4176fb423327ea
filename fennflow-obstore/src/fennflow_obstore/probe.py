"""Probes what a namespace enforces (P15), on one key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uuid_utils

from fennflow.connectors import Capabilities, Location, ObjectAttributes, PutRequest
from fennflow.exceptions import (
    BaseConnectorException,
    ConnectorUnavailableException,
    PreconditionFailedException,
)

if TYPE_CHECKING:
    from fennflow_obstore.connector import ObstoreConnector

TEXT = ObjectAttributes(media_type="text/plain")
STAMPED = ObjectAttributes(media_type="text/plain", metadata={"fennflow_seq": "1"})
"""Attributes with metadata like those by which FennFlow recognises its objects (P11)."""


async def probe(connector: ObstoreConnector, namespace: str, reserved_prefix: str) -> Capabilities:
    """Find out what a namespace enforces."""
    # In a separate directory, so that objects of concurrent probes are not in it.
    key = f"{reserved_prefix}/probe/{uuid_utils.uuid7()}/object"
    await connector.put(PutRequest(namespace, key, STAMPED), b"1")
    try:
        there = await connector.head(namespace, Location(key))
        # Without its stamp, an object that FennFlow wrote at a user's key could not be recognised.
        stamps = there is not None and STAMPED.metadata.items() <= there.metadata.items()
        hierarchical = await _refuses_key(connector, namespace, f"{key}/below")
        long = f"{key.rpartition('/')[0]}/{'x' * 256}"
        short_names = await _refuses_key(connector, namespace, long)
        conditional_create = stamps and await _refuses(connector, namespace, key)
    finally:
        keeps_directories = await _delete(connector, namespace, key)
    return Capabilities(
        conditional_create=conditional_create,
        keeps_directories=keeps_directories,
        hierarchical=hierarchical,
        short_names=short_names,
    )


async def _refuses_key(connector: ObstoreConnector, namespace: str, key: str) -> bool:
    """Return whether nothing can be written below a key, as on a file system."""
    for last in (False, True):
        try:
            await connector.put_once(namespace, key, b"1", TEXT)
        except BaseConnectorException as error:
            # Gateways answer 400, 409 or 500, and would do so each time.
            if isinstance(error, ConnectorUnavailableException) and not error.ambiguous:
                raise
            if last:
                return True
        else:
            await connector.delete_one(namespace, key)
            return False
    return False


async def _refuses(connector: ObstoreConnector, namespace: str, key: str) -> bool:
    try:
        await connector.put(PutRequest(namespace, key, TEXT, if_none_match=True), b"2")
    except PreconditionFailedException:
        return True
    except ConnectorUnavailableException:
        raise
    except BaseConnectorException:
        return False  # the server does not support the condition
    return False


async def _delete(connector: ObstoreConnector, namespace: str, key: str) -> bool:
    """Delete the probe's objects as a batch, and return whether a directory is left (JuiceFS)."""
    parent = key.rpartition("/")[0]
    try:
        await connector.delete_batch(namespace, [key], attempts=1)
        kept = [each async for each in connector.list(namespace, parent)] != []
    except BaseConnectorException:
        # The server refuses the request or its checksum, or obstore does not understand the answer.
        # Single deletions leave no directories behind.
        kept = True
    if kept:
        # A single deletion also removes the directory.
        await connector.put(PutRequest(namespace, key, TEXT), b"3")
        await connector.delete_one(namespace, key)
    return kept
