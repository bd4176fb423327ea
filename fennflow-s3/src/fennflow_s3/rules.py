"""Lifecycle rules of a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fennflow.exceptions import BaseConnectorException
from fennflow_s3.client import translated

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client


async def rules_on(client: S3Client, bucket: str, prefix: str) -> Sequence[str]:
    """Return the names of the rules that delete or archive objects under a prefix.

    A rule that asks for tags is left out: FennFlow gives staged bytes no tags but the user's. So is one
    for versions that are not current, as staged bytes have one version.
    """
    try:
        with translated("read the lifecycle rules of", bucket):
            answer: Any = await client.get_bucket_lifecycle_configuration(Bucket=bucket)
    except BaseConnectorException:
        return ()  # there are none, or they are not shown to this user
    return [
        str(rule.get("ID") or f"rule {number}")
        for number, rule in enumerate(answer.get("Rules", ()), start=1)
        if rule.get("Status") == "Enabled" and _acts_on(rule, prefix)
    ]


def _acts_on(rule: Any, prefix: str) -> bool:
    filters: dict[str, Any] = rule.get("Filter") or {}
    both: dict[str, Any] = filters.get("And") or {}
    if "Tag" in filters or both.get("Tags"):
        return False
    named: str = filters.get("Prefix") or both.get("Prefix") or rule.get("Prefix") or ""
    # Expiration may be of delete markers alone.
    removing = {"Days", "Date"} & set(rule.get("Expiration") or {})
    acts = bool(removing) or bool(rule.get("Transitions"))
    return acts and (prefix.startswith(named) or named.startswith(prefix))
