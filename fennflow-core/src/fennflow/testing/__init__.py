"""Tools for tests of plugins and programs: conformance suites, and S3 servers that start quickly.

Install it with `pip install 'fennflow[testing]>=1.0'`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fennflow.testing import faults as faults
from fennflow.testing.boundaries import Boundary, boundaries, killing
from fennflow.testing.databases import PostgresqlServer, postgresql_server
from fennflow.testing.seaweedfs import seaweedfs_server
from fennflow.testing.servers import (
    Fault,
    S3Request,
    S3Server,
    juicefs_gateway,
    moto_server,
    strict_s3_server,
)

if TYPE_CHECKING:
    from fennflow.testing.backend_suite import BackendSuite as BackendSuite
    from fennflow.testing.connector_suite import ConnectorSuite as ConnectorSuite
    from fennflow.testing.stream_suite import Target as Target
else:
    _SUITES = {
        "BackendSuite": "backend_suite",
        "ConnectorSuite": "connector_suite",
        "Target": "stream_suite",
    }

    def __getattr__(name: str) -> object:
        # The suites need pytest; programs that only start a server do not.
        if name in _SUITES:
            return getattr(import_module(f"{__name__}.{_SUITES[name]}"), name)
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)


__all__ = [
    "BackendSuite",
    "Boundary",
    "ConnectorSuite",
    "Fault",
    "PostgresqlServer",
    "S3Request",
    "S3Server",
    "Target",
    "boundaries",
    "faults",
    "juicefs_gateway",
    "killing",
    "moto_server",
    "postgresql_server",
    "seaweedfs_server",
    "strict_s3_server",
]
