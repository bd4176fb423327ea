"""The behaviour of a bucket is measured, and the test objects are removed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from moto.s3.models import S3Backend

from fennflow.connectors import Capabilities, InMemoryConnectorConfig, ObstoreConnectorConfig
from fennflow.engine.measuring import Check, measure
from fennflow.exceptions import NoSuchNamespaceException
from fennflow.testing import strict_s3_server
from stores import Store, make_store, new_bucket, s3_config

CONDITIONS = {
    "refuses a copy to a key that exists",
    "refuses a copy if the target has another ETag",
    "refuses to delete another ETag",
    "refuses to delete other ETags in a batch",
}


async def measured(store: Store) -> Sequence[Check]:
    async with store.connector() as connector:
        checks = await measure(connector, store.namespace, ".fennflow")
    assert await store.objects() == {}
    return checks


async def test_of_creates_that_arrive_together_on_the_moto_server_one_succeeds(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto checks for the object before it stores the new one; it is slowed down in between."""
    put = S3Backend.put_object

    def put_later(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01)
        return put(*args, **kwargs)

    monkeypatch.setattr(S3Backend, "put_object", put_later)
    checks = await measured(await make_store("moto", request))
    assert "lets one of ten simultaneous creates succeed" not in denied(checks)


def denied(checks: Sequence[Check]) -> set[str]:
    return {each.name for each in checks if each.result == "no"}


@pytest.mark.parametrize("kind", ["strict", "strict-versioned"])
async def test_a_strict_server_does_all(kind: str, request: pytest.FixtureRequest) -> None:
    checks = await measured(await make_store(kind, request))
    assert len(checks) > 25
    assert "unclear" not in {each.result for each in checks}
    assert denied(checks) == (set() if kind == "strict-versioned" else {"keeps versions"})


async def test_what_a_server_lacks_is_measured() -> None:
    with strict_s3_server(without=["checksums", "upload clean-up"]) as server:
        store = Store(s3_config(server, max_attempts=1), await new_bucket(server), server)
        assert denied(await measured(store)) == {
            "refuses bytes with another SHA-256",
            "keeps versions",
            "lists unfinished uploads",
            "aborts unfinished uploads",
        }


async def test_conditions_that_are_ignored_are_measured() -> None:
    config = InMemoryConnectorConfig(name="ignores", capabilities=Capabilities())
    found = denied(await measured(Store(config, "bucket")))
    assert found >= {*CONDITIONS, "refuses to create an object that exists"}
    assert "lets one of ten simultaneous creates succeed" in found


async def test_local_files_are_measured(tmp_path: Path) -> None:
    store = Store(ObstoreConnectorConfig(url=f"file://{tmp_path}"), "bucket")
    found = denied(await measured(store))
    assert found >= {
        "accepts names of 300 bytes",
        "accepts an object below another one (a and a/b)",
        *(CONDITIONS - {"refuses a copy to a key that exists"}),
    }


async def test_a_bucket_that_is_not_there_is_an_error() -> None:
    with strict_s3_server() as server:
        store = Store(s3_config(server, max_attempts=1), "gone", server)
        async with store.connector() as connector:
            with pytest.raises(NoSuchNamespaceException):
                await measure(connector, store.namespace, ".fennflow")
