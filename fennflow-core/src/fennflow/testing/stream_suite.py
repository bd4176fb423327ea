"""The tests of streams in `ConnectorSuite`, and the helpers of the suite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from fennflow import ConfigDict, plugins
from fennflow.config import ConnectorConfig
from fennflow.connectors import Connector, Location, ObjectAttributes, PutRequest
from fennflow.exceptions import NoSuchKeyException, PreconditionFailedException

TEXT = ObjectAttributes(media_type="text/plain")


@dataclass(frozen=True)
class Target:
    """The store to test.

    Args:
        config: of the connector.
        namespace: an existing, empty namespace.
    """

    config: ConnectorConfig
    namespace: str


@asynccontextmanager
async def opened(target: Target) -> AsyncGenerator[Connector]:
    """Open the connector of a target as an engine does, through its plugin."""
    config = ConfigDict(connector=target.config)
    connector = plugins.registry().connector_for(target.config).factory(target.config, config)
    await connector.open()
    await connector.capabilities(target.namespace)
    try:
        yield connector
    finally:
        await connector.aclose()


async def keys(
    connector: Connector, namespace: str, prefix: str = "", *, start_after: str = ""
) -> list[str]:
    """Return the keys under a prefix, as the store lists them."""
    listing = connector.list(namespace, prefix, start_after=start_after)
    return [stored.location.key async for stored in listing]


def require(claimed: bool, capability: str) -> None:  # noqa: FBT001 - read as a sentence
    """Skip a test of a capability that the store does not claim."""
    if not claimed:
        pytest.skip(f"The store does not claim the capability {capability}.")


async def chunks_of(body: bytes) -> AsyncGenerator[bytes]:
    """Yield a body in pieces of odd sizes."""
    for start in range(0, len(body), 999_983):
        yield body[start : start + 999_983]


class StreamSuite:
    """Tests of streams and uploads in the contract of `fennflow.connectors`."""

    @pytest.fixture
    def target(self) -> Target:
        """Return the store to test; override it."""
        pytest.fail("Override the fixture `target` in your subclass of ConnectorSuite.")

    @pytest.mark.parametrize("size", [0, 1, 40 << 20])
    def test_what_arrives_in_chunks_is_written_and_read_in_chunks(
        self, target: Target, size: int
    ) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                attributes = ObjectAttributes(media_type="text/plain", metadata={"a": "ü"})
                body = bytes(range(251)) * (size // 251) + b"x" * (size % 251)
                await connector.upload(
                    PutRequest(target.namespace, "a", attributes), chunks_of(body)
                )
                stored = await connector.head(target.namespace, Location("a"))
                assert stored is not None
                assert (stored.size, stored.metadata) == (size, {"a": "ü"})
                for start, end in ((0, None), (size // 3, None), (size // 4, size // 2 + 1)):
                    parts = connector.stream(
                        target.namespace,
                        Location("a"),
                        if_match=stored.etag,
                        start=start,
                        end=end,
                    )
                    if size:
                        assert b"".join([part async for part in parts]) == body[start:end]

        asyncio.run(scenario())

    def test_a_stream_that_fails_writes_nothing(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                uploads: list[str] = []

                async def fail() -> AsyncGenerator[bytes]:
                    yield b"x" * (40 << 20)
                    raise ZeroDivisionError

                async def on_upload(upload_id: str) -> None:
                    uploads.append(upload_id)

                with pytest.raises(ZeroDivisionError):
                    await connector.upload(
                        PutRequest(target.namespace, "a", TEXT, on_upload=on_upload), fail()
                    )
                for upload_id in uploads:
                    await connector.abort_upload(target.namespace, "a", upload_id)
                assert await connector.head(target.namespace, Location("a")) is None
                assert await keys(connector, target.namespace) == []

        asyncio.run(scenario())

    def test_a_stream_of_what_is_missing_or_another_one_is_refused(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                location = Location("a")
                with pytest.raises(NoSuchKeyException):
                    await anext(connector.stream(target.namespace, location, if_match="x"))
                first = await connector.put(PutRequest(target.namespace, "a", TEXT), b"1")
                second = await connector.put(PutRequest(target.namespace, "a", TEXT), b"2")
                with pytest.raises(PreconditionFailedException):
                    await anext(connector.stream(target.namespace, location, if_match=first.etag))
                parts = connector.stream(target.namespace, location, if_match=second.etag)
                assert [part async for part in parts] == [b"2"]

        asyncio.run(scenario())

    def test_aborting_an_upload_that_is_gone_does_nothing(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                # Some servers accept any word as an id, others only a UUID.
                upload_id = "01a20a88-0a32-74f7-87bd-f8db861a72e0"
                await connector.abort_upload(target.namespace, "a", upload_id)

        asyncio.run(scenario())
