"""The suite that a connector passes to call itself conformant.

A third party subclasses it with one fixture:

```python
class TestMyStore(ConnectorSuite):
    @pytest.fixture
    def target(self, tmp_path):
        return Target(MyStoreConnectorConfig(path=tmp_path), namespace="bucket")
```

The tests are plain functions that run their own event loop, so they need no pytest plugin and work
with any.
"""

from __future__ import annotations

import asyncio

import pytest

from fennflow import ConfigDict, UnitOfWork
from fennflow.connectors import (
    Capabilities,
    CopyRequest,
    CopySource,
    Deletion,
    Location,
    ObjectAttributes,
    PutRequest,
)
from fennflow.exceptions import (
    BaseConnectorException,
    MetadataException,
    NoSuchKeyException,
    PreconditionFailedException,
)
from fennflow.files import BinaryContent, JsonContent, TextContent
from fennflow.repositories import CrudRepository, RepoField
from fennflow.testing.stream_suite import TEXT, StreamSuite, Target, keys, opened, require


class ConnectorSuite(StreamSuite):
    """Tests of the contract in `fennflow.connectors`."""

    def test_what_was_put_is_read_back(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                attributes = ObjectAttributes(
                    media_type="application/json",
                    metadata={"author": "Zoë", "Mixed Case": " ünï ", "plain": "a b", "empty": ""},
                )
                put = await connector.put(
                    PutRequest(target.namespace, "a/b.json", attributes), b"[1]"
                )
                got, body = await connector.get(target.namespace, Location("a/b.json"))
                head = await connector.head(target.namespace, Location("a/b.json"))
                assert body == b"[1]"
                assert head is not None
                for stored in (got, head):
                    assert stored.location.key == "a/b.json"
                    assert stored.etag == put.etag
                    assert stored.size == 3
                    assert stored.media_type == "application/json"
                    assert stored.metadata == attributes.metadata

        asyncio.run(scenario())

    @pytest.mark.parametrize("size", [0, 1, 3 << 20])
    def test_bodies_of_any_size_come_back(self, target: Target, size: int) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
                await connector.put(PutRequest(target.namespace, "body", TEXT), body)
                assert (await connector.get(target.namespace, Location("body")))[1] == body

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        "key", ["with space", "a+b", "a%20b", "a&b=c?d#e", "naïve/日本語/😀.txt", "q'u\"o<t>e;,"]
    )
    def test_keys_may_have_any_printable_character(self, target: Target, key: str) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                await connector.put(PutRequest(target.namespace, key, TEXT), b"1")
                assert (await connector.get(target.namespace, Location(key)))[1] == b"1"
                await connector.copy(
                    CopyRequest(
                        target.namespace, f"{key}2", CopySource(target.namespace, Location(key))
                    )
                )
                assert set(await keys(connector, target.namespace)) == {key, f"{key}2"}
                report = await connector.delete(
                    target.namespace,
                    [Deletion(location=Location(each)) for each in (key, f"{key}2")],
                )
                assert list(report.errors) == [None, None]

        asyncio.run(scenario())

    def test_nothing_is_found_where_nothing_lies(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                assert await connector.head(target.namespace, Location("none")) is None
                with pytest.raises(NoSuchKeyException):
                    await connector.get(target.namespace, Location("none"))
                with pytest.raises(NoSuchKeyException):
                    await connector.copy(
                        CopyRequest(
                            target.namespace, "b", CopySource(target.namespace, Location("none"))
                        )
                    )
                assert await keys(connector, target.namespace) == []

        asyncio.run(scenario())

    def test_a_put_replaces_and_changes_the_etag(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                first = await connector.put(PutRequest(target.namespace, "a", TEXT), b"1")
                second = await connector.put(PutRequest(target.namespace, "a", TEXT), b"2")
                assert first.etag != second.etag
                assert (await connector.get(target.namespace, Location("a")))[1] == b"2"
                with pytest.raises(PreconditionFailedException):
                    await connector.get(target.namespace, Location("a"), if_match=first.etag)
                location = Location("a")
                got = await connector.get(target.namespace, location, if_match=second.etag)
                assert got[1] == b"2"

        asyncio.run(scenario())

    @pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a")])
    def test_a_key_below_another_one_is_held_or_refused_as_the_capabilities_say(
        self, target: Target, first: str, second: str
    ) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                namespace = target.namespace
                hierarchical = (await connector.capabilities(namespace)).hierarchical
                await connector.put(PutRequest(namespace, first, TEXT), b"1")
                # Deleting an object that does not exist is not an error.
                assert await connector.head(namespace, Location(second)) is None
                gone = await connector.delete(namespace, [Deletion(location=Location(second))])
                assert list(gone.errors) == [None]
                try:
                    await connector.put(PutRequest(namespace, second, TEXT), b"2")
                except BaseConnectorException:
                    assert hierarchical, "Capabilities.hierarchical has to say so"
                    assert await keys(connector, namespace) == [first]
                else:
                    assert not hierarchical
                    assert await keys(connector, namespace) == sorted([first, second])
                assert (await connector.get(namespace, Location(first)))[1] == b"1"

        asyncio.run(scenario())

    def test_creating_is_as_exclusive_as_the_capabilities_say(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                capabilities = await connector.capabilities(target.namespace)
                require(capabilities.conditional_create, "conditional_create")

                async def create(number: int) -> bool:
                    try:
                        await connector.put(
                            PutRequest(target.namespace, "a", TEXT, if_none_match=True),
                            b"%d" % number,
                        )
                    except PreconditionFailedException:
                        return False
                    return True

                async with asyncio.TaskGroup() as group:
                    racing = [group.create_task(create(number)) for number in range(20)]
                winners = [number for number, task in enumerate(racing) if task.result()]
                assert len(winners) == 1
                body = (await connector.get(target.namespace, Location("a")))[1]
                assert body == b"%d" % winners[0]

        asyncio.run(scenario())

    def test_a_copy_has_bytes_media_type_and_metadata(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                attributes = ObjectAttributes(media_type="text/css", metadata={"von": "Zoë"})
                await connector.put(PutRequest(target.namespace, "a", attributes), b"1")
                copied = await connector.copy(
                    CopyRequest(
                        target.namespace, "dir/b", CopySource(target.namespace, Location("a"))
                    )
                )
                stored, body = await connector.get(target.namespace, Location("dir/b"))
                assert body == b"1"
                assert stored.etag == copied.etag
                assert stored.media_type == "text/css"
                assert stored.metadata == attributes.metadata

        asyncio.run(scenario())

    def test_a_copy_with_attributes_of_its_own_keeps_the_bytes_alone(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                attributes = ObjectAttributes(media_type="text/css", metadata={"von": "Zoë"})
                put = await connector.put(PutRequest(target.namespace, "a", attributes), b"1")
                other = ObjectAttributes(media_type="text/html", metadata={"für": "Ann"})
                source = CopySource(target.namespace, Location("a"), put.etag)
                await connector.copy(CopyRequest(target.namespace, "b", source, attributes=other))
                stored, body = await connector.get(target.namespace, Location("b"))
                assert body == b"1"
                assert stored.media_type == "text/html"
                assert stored.metadata == other.metadata

        asyncio.run(scenario())

    def test_copies_are_as_conditional_as_the_capabilities_say(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                capabilities = await connector.capabilities(target.namespace)
                require(capabilities.conditional_copy, "conditional_copy")
                await connector.put(PutRequest(target.namespace, "new", TEXT), b"new")
                old = await connector.put(PutRequest(target.namespace, "old", TEXT), b"old")
                source = CopySource(target.namespace, Location("new"))
                with pytest.raises(PreconditionFailedException):
                    await connector.copy(
                        CopyRequest(target.namespace, "old", source, if_none_match=True)
                    )
                with pytest.raises(PreconditionFailedException):
                    await connector.copy(
                        CopyRequest(target.namespace, "old", source, if_match="0" * 32)
                    )
                assert (await connector.get(target.namespace, Location("old")))[1] == b"old"
                await connector.copy(
                    CopyRequest(target.namespace, "old", source, if_match=old.etag)
                )
                await connector.copy(
                    CopyRequest(target.namespace, "free", source, if_none_match=True)
                )
                assert (await connector.get(target.namespace, Location("old")))[1] == b"new"

        asyncio.run(scenario())

    def test_a_batch_of_deletions_reports_each(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                for key in ("a", "b/c", "keep"):
                    await connector.put(PutRequest(target.namespace, key, TEXT), b"1")
                gone = [Deletion(location=Location(key)) for key in ("a", "b/c", "never was")]
                for _ in range(2):
                    report = await connector.delete(target.namespace, gone)
                    assert list(report.errors) == [None, None, None]
                assert await keys(connector, target.namespace) == ["keep"]

        asyncio.run(scenario())

    def test_deletions_are_as_conditional_as_the_capabilities_say(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                capabilities = await connector.capabilities(target.namespace)
                require(capabilities.conditional_delete != "none", "conditional_delete")
                stored = await connector.put(PutRequest(target.namespace, "a", TEXT), b"1")
                await connector.put(PutRequest(target.namespace, "b", TEXT), b"2")
                other = Deletion(location=Location("a"), if_match="0" * 32)
                report = await connector.delete(target.namespace, [other])
                assert isinstance(report.errors[0], PreconditionFailedException)
                if capabilities.conditional_delete == "batch":
                    second = Deletion(location=Location("b"))
                    report = await connector.delete(target.namespace, [other, second])
                    assert isinstance(report.errors[0], PreconditionFailedException)
                    assert report.errors[1] is None
                assert (await connector.get(target.namespace, Location("a")))[1] == b"1"
                mine = Deletion(location=Location("a"), if_match=stored.etag)
                for _ in range(2):
                    assert (await connector.delete(target.namespace, [mine])).errors[0] is None
                assert await connector.head(target.namespace, Location("a")) is None

        asyncio.run(scenario())

    def test_a_conditional_deletion_of_nothing_has_succeeded(self, target: Target) -> None:
        """The engine may repeat a deletion (P7)."""

        async def scenario() -> None:
            async with opened(target) as connector:
                capabilities = await connector.capabilities(target.namespace)
                require(capabilities.conditional_delete != "none", "conditional_delete")
                first = await connector.put(PutRequest(target.namespace, "a", TEXT), b"1")
                second = await connector.put(PutRequest(target.namespace, "dir/b", TEXT), b"2")
                gone = [
                    Deletion(location=Location("a"), if_match=first.etag),
                    Deletion(location=Location("dir/b"), if_match=second.etag),
                    Deletion(location=Location("never was"), if_match=first.etag),
                ]
                batches = capabilities.conditional_delete == "batch"
                for batch in [gone] if batches else [[each] for each in gone]:
                    for _ in range(2):
                        report = await connector.delete(target.namespace, batch)
                        assert list(report.errors) == [None] * len(batch)
                for each in gone:
                    report = await connector.delete(target.namespace, [each])
                    assert list(report.errors) == [None]
                assert await keys(connector, target.namespace) == []

        asyncio.run(scenario())

    def test_a_listing_has_every_key_once_in_an_order_of_its_own(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                names = ["b", "a/2", "a/10", "ab", "a-", "ä", "😀", "\uff5e"]
                for name in names:
                    await connector.put(PutRequest(target.namespace, name, TEXT), b"1")
                for prefix in ("", "a", "a/", "a-", "none"):
                    listed = await keys(connector, target.namespace, prefix)
                    wanted = [name for name in names if name.startswith(prefix)]
                    assert sorted(listed) == sorted(wanted)

        asyncio.run(scenario())

    def test_a_listing_goes_on_after_a_key(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                for name in ("a", "b/1", "b/2", "c"):
                    await connector.put(PutRequest(target.namespace, name, TEXT), b"1")
                for prefix in ("", "b/"):
                    listed = await keys(connector, target.namespace, prefix)
                    for number, last in enumerate(listed, 1):
                        after = await keys(connector, target.namespace, prefix, start_after=last)
                        assert after == listed[number:]

        asyncio.run(scenario())

    def test_versions_are_kept_and_deleted_one_by_one(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                capabilities = await connector.capabilities(target.namespace)
                require(capabilities.versioned, "versioned")
                first = await connector.put(PutRequest(target.namespace, "a", TEXT), b"1")
                second = await connector.put(PutRequest(target.namespace, "a", TEXT), b"2")
                await connector.put(PutRequest(target.namespace, "ab", TEXT), b"3")
                versions = await connector.versions(target.namespace, "a")
                assert [each.location for each in versions] == [second.location, first.location]
                assert (await connector.get(target.namespace, first.location))[1] == b"1"
                await connector.delete(target.namespace, [Deletion(location=Location("a"))])
                assert await connector.head(target.namespace, Location("a")) is None
                assert (await connector.get(target.namespace, second.location))[1] == b"2"
                await connector.delete(target.namespace, [Deletion(location=second.location)])
                versions = await connector.versions(target.namespace, "a")
                assert [each.location for each in versions] == [first.location]

        asyncio.run(scenario())

    def test_the_probe_leaves_nothing_behind(self, target: Target) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                assert isinstance(await connector.probe(target.namespace), Capabilities)
                assert await keys(connector, target.namespace) == []

        asyncio.run(scenario())

    @pytest.mark.parametrize("size", [100, 1024, 8192])
    def test_metadata_is_kept_whole_or_refused_before_any_request(
        self, target: Target, size: int
    ) -> None:
        async def scenario() -> None:
            async with opened(target) as connector:
                attributes = ObjectAttributes(media_type="text/plain", metadata={"a": "x" * size})
                try:
                    connector.validate(target.namespace, "a", attributes)
                except MetadataException:
                    assert size > 1024
                    return
                await connector.put(PutRequest(target.namespace, "a", attributes), b"1")
                stored = await connector.head(target.namespace, Location("a"))
                assert stored is not None
                assert stored.metadata == attributes.metadata

        asyncio.run(scenario())

    def test_a_unit_of_work_commits_and_compensates(self, target: Target) -> None:
        class UOW(UnitOfWork):
            files = RepoField(CrudRepository, namespace=target.namespace)
            config = ConfigDict(connector=target.config)

        async def scenario() -> None:
            async with UOW() as uow:
                await uow.files.at("folder").put(
                    TextContent.from_content("old", filename="text"),
                    JsonContent.from_content([1], filename="json"),
                )
            with pytest.raises(ZeroDivisionError):
                async with UOW() as uow:
                    await uow.files.put(
                        BinaryContent(data=b"new", media_type="a/b", filename="folder/text")
                    )
                    await uow.files.put(
                        BinaryContent(data=b"more", media_type="a/b", filename="folder/more")
                    )
                    await uow.files.delete("folder/json")
                    assert await uow.files.list() == ["folder/more", "folder/text"]
                    raise ZeroDivisionError
            async with opened(target) as connector:
                left = await keys(connector, target.namespace)
                assert sorted(left) == ["folder/json", "folder/text"]
            async with UOW() as uow:
                assert (await uow.files.get("folder/text")).one().content == "old"
                await uow.files.put(TextContent.from_content("new", filename="folder/text"))
                await uow.files.delete("folder/json")
            async with opened(target) as connector:
                assert await keys(connector, target.namespace) == ["folder/text"]
            async with UOW() as uow:
                assert (await uow.files.get("folder/text")).one().content == "new"

        asyncio.run(scenario())
