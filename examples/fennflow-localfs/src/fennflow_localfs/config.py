"""What a user configures."""

from __future__ import annotations

from typing import Annotated

from pydantic import DirectoryPath, Field

from fennflow.config import ConnectorConfig


class LocalFsConnectorConfig(ConnectorConfig):
    """A directory; every namespace is a directory in it, made at the first write.

    Args:
        root: the directory, which must exist. Symbolic links below it are not followed.
        file_mode: of files that are written; private by default, as they hold metadata.
        directory_mode: of directories that are made.
    """

    root: DirectoryPath
    file_mode: Annotated[int, Field(ge=0o600, le=0o777)] = 0o600
    directory_mode: Annotated[int, Field(ge=0o700, le=0o777)] = 0o700
