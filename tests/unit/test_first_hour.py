"""Mistakes of a first hour: the error says what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

import fennflow
from fennflow import ConfigDict, UnitOfWork
from fennflow.exceptions import ConfigException, FileException, KeyException
from fennflow.files import BinaryContent, FileContent, TextContent
from fennflow.repositories import CrudRepository, PutRepository, RepoField
from fennflow.sync import SyncUnitOfWork


class UOW(UnitOfWork):
    notes = RepoField(CrudRepository, namespace="notes")


class WithoutAsync(SyncUnitOfWork):
    notes = RepoField(CrudRepository, namespace="notes")


any_field = cast("Any", UOW.notes)
any_class: Any = UOW
text_class: Any = TextContent
without_async: Any = WithoutAsync


def declare(**members: Any) -> object:
    return type("Wrong", (UnitOfWork,), members)


@pytest.mark.parametrize(
    ("mistake", "error", "hint"),
    [
        (lambda: any_field.put, AttributeError, r"to an open unit of work: .*put"),
        (lambda: any_class().put(), AttributeError, r"uow\.notes\.put"),
        (lambda: without_async().put(), AttributeError, r"uow\.notes\.put"),
        (lambda: any_class().note, AttributeError, "Its repositories are notes"),
        (lambda: cast("Any", UnitOfWork()).notes, AttributeError, "notes = RepoField"),
        (lambda: declare(notes=CrudRepository), ConfigException, "notes = RepoField"),
        (lambda: any_class(auto_commit="no"), ConfigException, "neither True nor False"),
        (lambda: RepoField(CrudRepository, namespace=""), ConfigException, "name of a bucket"),
        (lambda: ConfigDict(connector=cast("Any", "s3")), ConfigException, "such as S3Conn"),
        (lambda: text_class("Hi"), FileException, r"TextContent\.from_content"),
        (lambda: text_class(data="Hi"), FileException, r"TextContent\.from_content"),
        (lambda: TextContent.from_content(cast("Any", b"")), FileException, "BinaryContent"),
        (lambda: cast("Any", FileContent)("a"), FileException, r"FileContent\.from_local_path"),
        (lambda: BinaryContent(data=b"", media_type="text"), FileException, "such as text/plain"),
        (
            lambda: cast("Any", BinaryContent).from_content(b""),
            FileException,
            r"BinaryContent\(data=",
        ),
        (
            lambda: cast("Any", CrudRepository)(namespace="notes"),
            ConfigException,
            r"files = RepoField\(CrudRepository",
        ),
        (lambda: cast("Any", CrudRepository)("notes"), ConfigException, "files = RepoField"),
        (lambda: cast("Any", fennflow).TextContent, ImportError, "from fennflow.files import"),
    ],
)
def test_what_to_write_is_in_the_error(
    mistake: Callable[[], object], error: type[Exception], hint: str
) -> None:
    with pytest.raises(error, match=hint):
        mistake()


def test_a_repository_class_may_be_inside_of_its_unit_of_work() -> None:
    class Whole(UnitOfWork):
        class Files(CrudRepository):
            pass

        files = RepoField(Files, namespace="files")

    assert isinstance(Whole(), UnitOfWork)


async def test_methods_of_other_names_and_wrong_paths_are_explained() -> None:
    class Whole(UnitOfWork):
        some = RepoField(PutRepository, namespace="some")
        notes = RepoField(CrudRepository, namespace="notes")

    async with Whole() as uow:
        notes, some = cast("Any", uow.notes), cast("Any", uow.some)
        with pytest.raises(AttributeError, match=r"FennFlow calls it put\(\)"):
            notes.upload("a")
        with pytest.raises(AttributeError, match=r"get\(\).*class Files\(PutRepository, GetRepo"):
            some.download("a")
        file = TextContent.from_content("Hi", filename="hi.txt")
        for path, hint in (([1], "several arguments"), (b"a", "Decode"), (file, "its filename")):
            with pytest.raises(KeyException, match=hint):
                await notes.get(path)
        called = notes.get("a")
        with pytest.raises(FileException, match="Use await"):
            await notes.put(called)
        called.close()
        with pytest.raises(ConfigException, match="expires_in"):
            await uow.hold(expires_in=cast("Any", "5"))
    with pytest.raises(ConfigException, match="not an id"):
        await Whole.commit_held(cast("Any", None))
