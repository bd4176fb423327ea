"""Every connector passes the suite that third parties run."""

from __future__ import annotations

import asyncio

import pytest
from typing_extensions import override

from fennflow.testing import ConnectorSuite, Target
from stores import ALL_STORES, OBSTORES, make_store

SEAWEEDFS = [
    pytest.param(kind, marks=pytest.mark.once)
    for kind in ("seaweedfs", "seaweedfs-versioned", "obstore-seaweedfs")
]


class TestConnectors(ConnectorSuite):
    @pytest.fixture(
        params=[*ALL_STORES, *OBSTORES, "moto-suspended", "strict-suspended", *SEAWEEDFS]
    )
    @override
    def target(self, request: pytest.FixtureRequest) -> Target:
        return asyncio.run(make_store(request.param, request)).target
