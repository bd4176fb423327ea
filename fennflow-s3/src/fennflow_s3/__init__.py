"""S3 connector for FennFlow, on aiobotocore."""

from fennflow_s3.config import S3ConnectorConfig

__all__ = ["S3ConnectorConfig"]
