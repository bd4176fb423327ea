"""Repositories: mixins with a method or two each, and the fields that bind them to a bucket.

A repository has only the operations that its class inherits. Paths are relative to the scope that
`at()` set; a `StoragePath`, which every method returns, is absolute.
"""

from __future__ import annotations

from fennflow.repositories.base import Repository
from fennflow.repositories.fields import RepoField, S3RepoField
from fennflow.repositories.reading import (
    GeneratePresignedUrlPrefixRepository,
    GeneratePresignedUrlRepository,
    GetPrefixRepository,
    GetRepository,
    ListRepository,
    StatRepository,
)
from fennflow.repositories.streaming import ObjectStream, StreamRepository
from fennflow.repositories.writing import (
    AdoptRepository,
    CopyRepository,
    CreateRepository,
    DeletePrefixRepository,
    DeleteRepository,
    PutRepository,
    UploadTicketRepository,
)

__all__ = [
    "AdoptRepository",
    "CopyRepository",
    "CreateRepository",
    "CrudRepository",
    "DeletePrefixRepository",
    "DeleteRepository",
    "GeneratePresignedUrlPrefixRepository",
    "GeneratePresignedUrlRepository",
    "GetPrefixRepository",
    "GetRepository",
    "ListRepository",
    "ObjectStream",
    "PutRepository",
    "RepoField",
    "Repository",
    "S3RepoField",
    "StatRepository",
    "StreamRepository",
    "UploadTicketRepository",
]


class CrudRepository(
    PutRepository,
    GetRepository,
    ListRepository,
    DeleteRepository,
    StatRepository,
    CopyRepository,
    StreamRepository,
):
    """What a program needs every day: put, get, list, delete, stat, exists, copy, move and open."""
