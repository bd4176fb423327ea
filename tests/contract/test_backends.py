"""Every backend passes the suite that third parties run."""

from __future__ import annotations

import pytest
from typing_extensions import override

from fennflow.backends import InMemoryBackendConfig
from fennflow.testing import BackendSuite
from stores import numbers


class TestInMemoryBackend(BackendSuite):
    @pytest.fixture
    @override
    def config(self) -> InMemoryBackendConfig:
        return InMemoryBackendConfig(name=f"b{next(numbers)}")
