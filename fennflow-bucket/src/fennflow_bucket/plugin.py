"""The plugin of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fennflow.hookspecs import BackendPlugin, hookimpl
from fennflow_bucket.config import BucketBackendConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fennflow.backends import Backend
    from fennflow.config import ConfigDict


@hookimpl
def fennflow_backends() -> Iterable[BackendPlugin]:
    """Return the backend in the bucket."""
    return [BackendPlugin("bucket", BucketBackendConfig, _new_backend)]


def _new_backend(config: BucketBackendConfig, settings: ConfigDict) -> Backend:
    from fennflow_bucket.backend import new_backend

    return new_backend(config, settings)
