"""The suite that every connector passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fennflow_localfs import LocalFsConnectorConfig
from typing_extensions import override

from fennflow.testing import ConnectorSuite, Target


class TestLocalFs(ConnectorSuite):
    """All of its tests, each in an empty directory."""

    @pytest.fixture
    @override
    def target(self, tmp_path: Path) -> Target:
        return Target(LocalFsConnectorConfig(root=tmp_path), namespace="bucket")
