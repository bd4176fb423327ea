"""A local directory as a store for FennFlow."""

from fennflow_localfs.config import LocalFsConnectorConfig

__all__ = ["LocalFsConnectorConfig"]
