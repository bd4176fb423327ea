"""Contents beyond text, JSON and bytes: models, URLs, and those that a factory chooses."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from fennflow.exceptions import FileException, MediaTypeCannotBeGuessedException
from fennflow.files import (
    BaseContent,
    BinaryContent,
    ContentFactory,
    DocumentContent,
    JsonContent,
    ModelContent,
    TextContent,
    UrlContent,
)
from fennflow.plugins import registry
from stores import Store


class Line(BaseModel):
    price: int


class Invoice(BaseModel):
    """With an alias, a nested model and a date."""

    number: int = Field(alias="invoice number")
    day: dt.date
    lines: list[Line]


def invoice() -> Invoice:
    day = dt.date(2026, 11, 24)
    return Invoice.model_validate({"invoice number": 7, "day": day, "lines": [{"price": 3}]})


async def test_a_model_comes_back_as_the_model(store: Store) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        content = ModelContent[Invoice].from_content(invoice(), filename="7.json")
        await uow.files.put(content, UrlContent.from_content("https://a.example/?b=c#d"))
        await uow.files.copy("7.json", "copy.json")
    async with uow_class() as uow:
        for name in ("7.json", "copy.json"):
            got = (await uow.files.get(name)).one()
            assert isinstance(got, ModelContent)
            assert got.content == invoice()
        [link] = (await uow.files.get_prefix()).filter(UrlContent)
        assert link.content == "https://a.example/?b=c#d"
        assert str(link.path).endswith(".uri")


def test_a_model_that_this_process_does_not_know_is_json() -> None:
    """Nothing is imported by a name that is stored with an object."""
    for tag in ("model:os.system", "model:", "model", "none:x"):
        assert registry().content_class(tag, "application/json") in {JsonContent, ModelContent}
    assert registry().content_class("model:os.system", "application/json") is JsonContent
    tag = registry().content_tag(ModelContent[Invoice])
    assert registry().content_class(tag, "application/json") is ModelContent[Invoice]


def test_what_is_no_such_model_is_refused() -> None:
    with pytest.raises(FileException, match="Name the model"):
        ModelContent(data=b"{}")
    with pytest.raises(FileException, match="holds Invoice, not Line"):
        ModelContent[Invoice].from_content(Line(price=1))  # type: ignore[arg-type]
    broken = ModelContent[Line](data=b'{"price": "secret"}', filename="l.json")
    with pytest.raises(FileException, match=r"l\.json is no Line: price") as caught:
        _ = broken.content
    assert "secret" not in str(caught.value)


def test_a_model_that_would_not_be_read_back_is_refused() -> None:
    class OneWay(BaseModel):
        secret: str = Field(exclude=True)

    with pytest.raises(FileException, match="Field required"):
        ModelContent[OneWay].from_content(OneWay(secret="x"))


@pytest.mark.parametrize("url", ["", "no url", "//host/path", "http://", "https://a b/"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(FileException, match="scheme"):
        UrlContent.from_content(url)


@pytest.mark.parametrize(
    ("media_type", "content"),
    [
        ("text/plain; charset=latin-1", TextContent),
        ("Application/JSON; charset=utf-8", JsonContent),
        ("text/uri-list", UrlContent),
        ("application/pdf", DocumentContent),
        ("application/x-unheard-of", BinaryContent),
    ],
)
def test_the_factory_chooses_by_media_type(media_type: str, content: type[BaseContent]) -> None:
    built = ContentFactory.from_bytes(media_type, b"1", filename="f", metadata={"a": "b"})
    assert type(built) is content
    assert (built.media_type, built.filename, built.metadata) == (media_type, "f", {"a": "b"})


def test_the_factory_reads_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"1,2")
    built = ContentFactory.from_local_path(tmp_path / "a.csv")
    assert isinstance(built, TextContent)
    assert (built.media_type, built.filename) == ("text/csv", "a.csv")
    (tmp_path / "b").write_bytes(b"%PDF-1.4\n")
    assert isinstance(ContentFactory.from_local_path(tmp_path / "b"), DocumentContent)
    with pytest.raises(FileException, match="No such file"):
        ContentFactory.from_local_path(tmp_path / "none")
    (tmp_path / "c").write_bytes(b"?")
    with pytest.raises(MediaTypeCannotBeGuessedException, match="c cannot be told"):
        ContentFactory.from_local_path(tmp_path / "c")


def test_the_factory_fetches_no_url() -> None:
    link = ContentFactory.from_url("https://unreachable.invalid/file.pdf", filename="l.uri")
    assert link.content == "https://unreachable.invalid/file.pdf"
