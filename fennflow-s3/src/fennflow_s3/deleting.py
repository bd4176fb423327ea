"""Deletions: in batches, or one by one if a server does not support batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fennflow.connectors import Deletion, DeletionReport, Location
from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ConnectorCapabilityException,
    ConnectorUnavailableException,
    NoSuchKeyException,
    NoSuchNamespaceException,
    PreconditionFailedException,
)
from fennflow_s3.client import from_code, is_refusal, translated

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

AT_ONCE = 10
"""Concurrent requests if a server has no DeleteObjects."""


def named_by(location: Location) -> Any:
    """Return the parameters that name an object or a version of it."""
    if location.version_id is None:
        return {"Key": location.key}
    return {"Key": location.key, "VersionId": location.version_id}


def null_version(deletion: Deletion) -> Deletion:
    """Return a permanent deletion of the object, if a deletion by key would leave a delete marker."""
    if deletion.location.version_id is not None:
        return deletion
    return replace(deletion, location=Location(deletion.location.key, "null"))


async def delete_batch(
    client: S3Client, namespace: str, deletions: Sequence[Deletion]
) -> DeletionReport:
    """Delete in one request, or one by one if the server does not support it.

    A key that the server refuses in a batch, for instance because XML cannot hold it, may be
    deleted by its own URL.
    """
    try:
        return await _delete_objects(client, namespace, deletions)
    except (
        AccessDeniedException,
        ConnectorUnavailableException,
        NoSuchNamespaceException,
    ):
        raise
    except BaseConnectorException as error:
        absent = isinstance(error, ConnectorCapabilityException)
        if error.ambiguous or not (absent or len(deletions) == 1):
            raise
    return await _delete_each(client, namespace, deletions)


async def delete_with_directories(
    client: S3Client, namespace: str, deletions: Sequence[Deletion]
) -> DeletionReport:
    """Delete from a server whose batches leave empty directories behind.

    A single deletion also removes the directories that become empty. So the last key of each
    directory is deleted by itself. Deleting the directory by its name could delete a file that was
    put in its place meanwhile.
    """
    last = {each.location.key.rpartition("/")[0]: index for index, each in enumerate(deletions)}
    alone = {index for parent, index in last.items() if parent}
    errors: list[BaseConnectorException | None] = [None] * len(deletions)
    retried = False
    together = [index for index in range(len(deletions)) if index not in alone]
    for indexes, delete in ((together, delete_batch), (sorted(alone), _delete_each)):
        if indexes:
            report = await delete(client, namespace, [deletions[index] for index in indexes])
            retried = retried or report.retried
            for index, error in zip(indexes, report.errors, strict=True):
                errors[index] = error
    return DeletionReport(errors=errors, retried=retried)


async def _delete_each(
    client: S3Client, namespace: str, deletions: Sequence[Deletion]
) -> DeletionReport:
    limit = asyncio.Semaphore(AT_ONCE)
    failures: list[BaseConnectorException] = []

    async def alone(deletion: Deletion) -> DeletionReport | None:
        async with limit:
            try:
                return await delete_one(client, namespace, deletion)
            except BaseConnectorException as error:
                failures.append(error)
                return None

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(alone(each)) for each in deletions]
    if failures:
        raise failures[0]
    reports = [report for task in tasks if (report := task.result()) is not None]
    return DeletionReport(
        errors=[error for report in reports for error in report.errors],
        retried=any(report.retried for report in reports),
    )


async def _delete_objects(
    client: S3Client, namespace: str, deletions: Sequence[Deletion]
) -> DeletionReport:
    objects: Any = [
        named_by(deletion.location)
        | ({} if deletion.if_match is None else {"ETag": f'"{deletion.if_match}"'})
        for deletion in deletions
    ]
    with translated(f"delete {len(deletions)} objects of", namespace, writes=True) as attempts:
        answer = await client.delete_objects(
            Bucket=namespace, Delete={"Objects": objects, "Quiet": True}
        )
    refused: dict[tuple[str, str | None], BaseConnectorException] = {}
    for error in answer.get("Errors", []):
        key, code = error.get("Key", ""), error.get("Code", "")
        refused[key, error.get("VersionId") or None] = from_code(
            code,
            error.get("Message", ""),
            0,
            "delete",
            f"{namespace}/{key}",
            ambiguous=not is_refusal(code, 0),
            retried=attempts.lost,
        )
    unclear = set(refused)
    errors: list[BaseConnectorException | None] = []
    for each in deletions:
        location = each.location
        # Some servers leave out the version.
        names = [(location.key, location.version_id), (location.key, None)]
        named = next((name for name in names if name in refused), None)
        unclear.discard(named or names[0])
        found = None if named is None else refused[named]
        errors.append(await _obstacle(client, namespace, each, found))
    if unclear:
        raise refused[unclear.pop()]  # an object that was not deleted must not count as deleted
    return DeletionReport(errors=errors, retried=attempts.lost)


async def delete_one(client: S3Client, namespace: str, deletion: Deletion) -> DeletionReport:
    """Delete one object; some servers enforce the ETag only in single deletions."""
    condition: Any = {} if deletion.if_match is None else {"IfMatch": f'"{deletion.if_match}"'}
    try:
        name = f"{namespace}/{deletion.location.key}"
        with translated("delete", name, writes=True) as attempts:
            await client.delete_object(Bucket=namespace, **named_by(deletion.location), **condition)
    except (ConnectorUnavailableException, NoSuchNamespaceException):
        raise
    except BaseConnectorException as error:
        obstacle = await _obstacle(client, namespace, deletion, error)
        return DeletionReport(errors=[obstacle], retried=error.retried)
    return DeletionReport(errors=[None], retried=attempts.lost)


async def _obstacle(
    client: S3Client, namespace: str, deletion: Deletion, error: BaseConnectorException | None
) -> BaseConnectorException | None:
    """Return what prevented a deletion; None if there is no object, as after an earlier attempt.

    If there is no object, some servers answer a deletion by ETag with NoSuchKey. Others answer
    PreconditionFailed, as for another ETag; then a HEAD decides.
    """
    if isinstance(error, NoSuchKeyException):
        return None
    if isinstance(error, PreconditionFailedException) and not error.contended:
        location = deletion.location
        try:
            with translated("head", f"{namespace}/{location.key}"):
                await client.head_object(Bucket=namespace, **named_by(location))
        except NoSuchKeyException:
            return None
    return error
