"""S3, Google Cloud Storage, Azure Blob and local files for FennFlow, on obstore."""

from fennflow_obstore.config import ObstoreConnectorConfig

__all__ = ["ObstoreConnectorConfig"]
