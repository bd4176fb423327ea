"""Azure Blob Storage passes the connectors' suite, on Azurite; `nox -s azurite` installs and runs it."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from typing_extensions import override

from azurite import ACCOUNT, azurite_server, new_container, request
from fennflow.reports import Difference
from fennflow.testing import ConnectorSuite, Target
from stores import Store


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Generator[int]:
    with azurite_server(tmp_path_factory.mktemp("azurite")) as port:
        yield port


class TestAzure(ConnectorSuite):
    @pytest.fixture
    @override
    def target(self, azurite: int) -> Target:
        return Target(*new_container(azurite))


async def test_no_blob_of_a_stranger_stops_a_catalog(azurite: int) -> None:
    config, container = new_container(azurite)
    forged = {"transaction": "01890000-0000-7000-8000-000000000000", "seq": f"{2**63}"}
    headers = {f"x-ms-meta-fennflow_{name}": value for name, value in forged.items()}
    for name in ("a//b", "c/forged", "c/plain"):
        target = f"/{ACCOUNT}/{container}/{name}"
        extra = {"x-ms-blob-type": "BlockBlob", **(headers if name == "c/forged" else {})}
        assert request(azurite, "PUT", target, extra) == 201
    uow_class = Store(config, container).uow()
    async with uow_class() as uow:
        assert list(await uow.files.list()) == ["c/forged", "c/plain"]
        assert (await uow.files.stat("c/forged")).metadata == {}
    [report] = (await uow_class.reconcile()).values()
    assert report.differences == {Difference.UNLISTED: 1}
