"""Lifecycle rules of a bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fennflow.connectors import LifecycleRules
from fennflow.exceptions import NoSuchKeyException
from fennflow_s3.client import translated

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client


async def rules_on(client: S3Client, bucket: str, prefix: str) -> LifecycleRules:
    """Return the effects of a bucket's rules under a prefix.

    Rules that depend on tags are left out, since staged bytes have only the user's tags. So are
    rules for noncurrent versions, since staged bytes have one version.

    Raises:
        AccessDeniedException: this user may not read them.
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
    # An expiration may be only for delete markers.
    removing = {"Days", "Date"} & set(rule.get("Expiration") or {})
    return bool(removing) or bool(rule.get("Transitions"))


def _overlaps(rule: Any, prefix: str) -> bool:
    named = _prefix(rule)
    return prefix.startswith(named) or named.startswith(prefix)


def _prefix(rule: Any) -> str:
    filters: dict[str, Any] = rule.get("Filter") or {}
    both: dict[str, Any] = filters.get("And") or {}
    return filters.get("Prefix") or both.get("Prefix") or rule.get("Prefix") or ""
