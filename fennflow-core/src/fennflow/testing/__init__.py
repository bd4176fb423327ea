"""What plugin authors and users test with: conformance suites, and S3 servers that start at once.

Install it with `pip install 'fennflow[testing]>=1.0'`.
"""

from __future__ import annotations

from fennflow.testing import faults as faults
from fennflow.testing.backend_suite import BackendSuite
from fennflow.testing.boundaries import Boundary, boundaries, killing
from fennflow.testing.connector_suite import ConnectorSuite, Target
from fennflow.testing.databases import PostgresqlServer, postgresql_server
from fennflow.testing.servers import (
    Fault,
    S3Request,
    S3Server,
    juicefs_gateway,
    moto_server,
    strict_s3_server,
)

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
    "strict_s3_server",
]
