"""The configuration of the backend in the bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SerializeAsAny, field_validator

from fennflow.config import MAX_SECONDS, BackendConfig, ConnectorConfig


class BucketBackendConfig(BackendConfig):
    """Catalog and journal in the object store: no database is needed.

    Any number of processes on any machines share a catalog, and each of them may be killed at any
    moment. The catalog is a log of objects below `<reserved prefix>/catalog/<name>/`. The store has
    to enforce conditional creation (`If-None-Match: *`) and to list what was just written, as S3,
    GCS, Azure, R2, MinIO and SeaweedFS do; another store is refused at the first write.

    Args:
        namespace: the bucket that holds the catalog. Its records may be for any bucket of the same
            store.
        name: of the catalog; several catalogs can share a bucket.
        connector: to the store that holds the catalog; None for the connector of the `ConfigDict`.
        cache_dir: directory in which the local copy of the catalog is kept between runs, so that a
            process with a large catalog starts quickly. None for a temporary file.
        max_staleness: seconds for which reads may use the local copy without a check. With 0 every
            read outside a transaction's own keys sends one GET first.
        max_batch: how many commands of concurrent transactions share one object of the log.
        commit_retention: the least number of seconds for which `UOW.commits()` can continue after a
            commit. The log is kept for half an hour in any case; keeping it longer costs storage
            and more requests to list it. All processes need the same value.

    Raises:
        ConfigException: a name that is not a valid path segment, or a number out of range.

    Example:
        ```python
        from fennflow.backends import BucketBackendConfig

        print(BucketBackendConfig(namespace="my-bucket").name)
        #> default
        ```
    """

    namespace: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")] = "default"
    connector: SerializeAsAny[ConnectorConfig] | None = None
    cache_dir: Path | None = None
    max_staleness: Annotated[float, Field(ge=0, le=60)] = 0.0
    max_batch: Annotated[int, Field(gt=0, le=10_000)] = 256
    commit_retention: Annotated[float, Field(ge=0, le=MAX_SECONDS)] = 0.0

    @field_validator("connector", mode="before")
    @classmethod
    def _connector(cls, value: object) -> object:
        # Pydantic would build the base class from a dict, but the class determines the plugin.
        if value is not None and not isinstance(value, ConnectorConfig):
            message = (
                f"must be an instance of a ConnectorConfig subclass, not {type(value).__name__}"
            )
            raise ValueError(message)
        return value
