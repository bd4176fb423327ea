"""What a user configures."""

from __future__ import annotations

from pydantic import DirectoryPath

from fennflow.config import ConnectorConfig


class LocalFsConnectorConfig(ConnectorConfig):
    """A directory; every namespace is a directory in it, made at the first write.

    Args:
        root: the directory, which must exist.
    """

    root: DirectoryPath
