"""Every connector passes the suite that third parties run."""

from __future__ import annotations

import asyncio

import pytest
from typing_extensions import override

from fennflow.testing import ConnectorSuite, Target
from stores import ALL_STORES, OBSTORES, make_store

ON_ONE_PYTHON = [
    pytest.param(kind, marks=pytest.mark.once)
    for kind in ("seaweedfs", "seaweedfs-versioned", "obstore-seaweedfs", "localbucket")
]
OF_METADATA = {
    "test_what_arrives_in_chunks_is_written_and_read_in_chunks",
    "test_what_was_put_is_read_back",
    "test_a_copy_has_bytes_media_type_and_metadata",
    "test_a_copy_with_attributes_of_its_own_keeps_the_bytes_alone",
    "test_metadata_is_kept_whole_or_refused_before_any_request",
}


class TestConnectors(ConnectorSuite):
    @pytest.fixture(
        params=[*ALL_STORES, *OBSTORES, "moto-suspended", "strict-suspended", *ON_ONE_PYTHON]
    )
    @override
    def target(self, request: pytest.FixtureRequest) -> Target:
        if request.param == "localbucket" and request.function.__name__ in OF_METADATA:
            pytest.skip(
                "localbucket keeps no metadata, and media types by the names of files alone"
            )
        return asyncio.run(make_store(request.param, request)).target
