"""Catalog and journal in the bucket: durable transactions without a database."""

from fennflow_bucket.config import BucketBackendConfig

__all__ = ["BucketBackendConfig"]
