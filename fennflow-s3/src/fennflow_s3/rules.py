"""Lifecycle rules of a bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fennflow.connectors import LifecycleRules
from fennflow.exceptions import NoSuchKeyException
from fennflow_s3.client import translated

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client


async def rules_on(client: S3Client, bucket: str, prefix: str) -> LifecycleRules:
    """Return what the rules of a bucket do under a prefix.

    A rule that asks for tags is left out: FennFlow gives staged bytes no tags but the user's. So is one
    for versions that are not current, as staged bytes have one version.

    Raises:
        AccessDeniedException: they are not shown to this user.
        ConnectorCapabilityException: the server has no such rules, or does not show them.
    """
    try:
        with translated("read the lifecycle rules of", bucket):
            answer: Any = await client.get_bucket_lifecycle_configuration(Bucket=bucket)
    except NoSuchKeyException:
        return LifecycleRules()  # NoSuchLifecycleConfiguration
    found = [
        (str(rule.get("ID") or f"rule {number}"), rule)
        for number, rule in enumerate(answer.get("Rules", ()), start=1)
        if rule.get("Status") == "Enabled"
    ]
    return LifecycleRules(
        removing=[name for name, rule in found if _removes(rule) and _overlaps(rule, prefix)],
        abort_uploads=any(
            rule.get("AbortIncompleteMultipartUpload") and not _prefix(rule) for _, rule in found
        ),
    )


def _removes(rule: Any) -> bool:
    filters: dict[str, Any] = rule.get("Filter") or {}
    both: dict[str, Any] = filters.get("And") or {}
    if "Tag" in filters or both.get("Tags"):
        return False
    # Expiration may be of delete markers alone.
    removing = {"Days", "Date"} & set(rule.get("Expiration") or {})
    return bool(removing) or bool(rule.get("Transitions"))


def _overlaps(rule: Any, prefix: str) -> bool:
    named = _prefix(rule)
    return prefix.startswith(named) or named.startswith(prefix)


def _prefix(rule: Any) -> str:
    filters: dict[str, Any] = rule.get("Filter") or {}
    both: dict[str, Any] = filters.get("And") or {}
    return filters.get("Prefix") or both.get("Prefix") or rule.get("Prefix") or ""
