"""Azure Blob Storage passes the connectors' suite, on Azurite; `nox -s azurite` installs and runs it."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from typing_extensions import override

from azurite import azurite_server, new_container
from fennflow.testing import ConnectorSuite, Target


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Generator[int]:
    with azurite_server(tmp_path_factory.mktemp("azurite")) as port:
        yield port


class TestAzure(ConnectorSuite):
    @pytest.fixture
    @override
    def target(self, azurite: int) -> Target:
        return Target(*new_container(azurite))
