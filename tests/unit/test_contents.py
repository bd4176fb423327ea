"""Contents beyond text, JSON and bytes: models, URLs, and those that a factory chooses."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import math
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Json,
    PrivateAttr,
    SecretBytes,
    SecretStr,
    computed_field,
    field_validator,
)

from fennflow.exceptions import FileException, MediaTypeCannotBeGuessedException
from fennflow.files import (
    AudioContent,
    BaseContent,
    BinaryContent,
    ContentFactory,
    DocumentContent,
    FileContent,
    ImageContent,
    JsonContent,
    ModelContent,
    StreamContent,
    TextContent,
    UrlContent,
)
from fennflow.files.round_trips import first_difference
from fennflow.paths import StoragePath
from fennflow.plugins import registry
from fennflow.responses import ObjectInfo
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


def _containing_itself() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"lines": [{"price": 1}, {"price": Decimal(2)}]}, r"at lines\.1\.price: .*Decimal"),
        ({"a": [1.0, math.nan]}, r"at a\.1: "),
        ({"a": {"b": "\ud800"}}, r"at a\.b: "),
        ({"a": {("x",): 1}}, r"at a: .*tuple"),
        ({"a": _containing_itself()}, r"at a\.0: Circular"),
        ({1}, r"at its root: .*set"),
    ],
)
def test_what_json_cannot_hold_is_named(value: object, place: str) -> None:
    with pytest.raises(FileException, match=place):
        JsonContent.from_content(value)


def test_the_field_of_a_model_that_json_cannot_hold_is_named() -> None:
    class Part(BaseModel):
        size: Any = None

    class Whole(BaseModel):
        parts: list[Part]

    whole = Whole(parts=[Part(), Part(size=object())])
    with pytest.raises(FileException, match=r"^Whole\.parts\.1\.size is not JSON-serialisable"):
        ModelContent[Whole].from_content(whole)
    cut = ModelContent[Whole](data=b'{"parts": [', filename="w.json")
    with pytest.raises(FileException, match=r"^w\.json is not a Whole: Invalid JSON: .*line 1"):
        _ = cut.content
    wrong = ModelContent[Whole](data=b'{"parts": [1]}', filename="w.json")
    with pytest.raises(FileException, match=r"^w\.json is not a Whole: parts\.0: "):
        _ = wrong.content


def test_bytes_that_are_not_the_model_are_refused() -> None:
    with pytest.raises(FileException, match="Name the model"):
        ModelContent(data=b"{}")
    with pytest.raises(FileException, match="holds Invoice, not Line"):
        ModelContent[Invoice].from_content(Line(price=1))  # type: ignore[arg-type]
    broken = ModelContent[Line](data=b'{"price": "secret"}', filename="l.json")
    with pytest.raises(FileException, match=r"l\.json is not a Line: price") as caught:
        _ = broken.content
    assert "secret" not in str(caught.value)


def test_a_model_that_would_not_be_read_back_is_refused() -> None:
    class OneWay(BaseModel):
        secret: str = Field(exclude=True)

    with pytest.raises(FileException, match="Field required"):
        ModelContent[OneWay].from_content(OneWay(secret="x"))


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: float
    y: float


class Animal(BaseModel):
    name: str


class Dog(Animal):
    tricks: int = 0


class Many(BaseModel):
    """Values that are read back equal, including NaN."""

    model_config = ConfigDict(ser_json_inf_nan="constants", extra="allow")

    number: float = float("nan")
    infinite: float = float("inf")
    point: Point = Point(float("nan"), 1)
    price: Decimal = Decimal("1.10")
    when: dt.datetime = dt.datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))
    color: Color = Color.RED
    pair: tuple[int, str] = (1, "a")
    names: set[str] = {"a"}  # one name, as sets have no order
    by_number: dict[int, bytes] = {1: b"x"}
    parsed: Json[list[int]] = [1]
    animal: Animal = Animal(name="Rex")
    nothing: None = None
    _cache: object = PrivateAttr(default_factory=object)


class Area(BaseModel):
    """Computed fields are left out if they could not be read back."""

    model_config = ConfigDict(extra="forbid")

    width: int

    @computed_field
    def doubled(self) -> int:
        return 2 * self.width


@pytest.mark.parametrize("model", [Many(more={"1": [float("nan")]}), Area(width=2)])
def test_a_model_is_read_back_as_it_was(model: BaseModel) -> None:
    back = ModelContent[type(model)].from_content(model).content  # type: ignore[misc]
    assert first_difference(model, back) is None
    assert back.model_dump_json() == model.model_dump_json()


class Login(BaseModel):
    user: str = "ann"
    password: SecretStr | SecretBytes


class Account(BaseModel):
    logins: list[Login]


class Measured(BaseModel):
    value: float | None


class Anything(BaseModel):
    value: Any = None


class Blob(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64")

    data: bytes


class Hidden(BaseModel):
    value: str = Field(default="", exclude=True)


class Owner(BaseModel):
    pet: Animal


class Shouting(BaseModel):
    value: str

    @field_validator("value")
    @classmethod
    def _louder(cls, value: str) -> str:
        return f"{value}!"


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (Account(logins=[Login(password=SecretStr("hunter2"))]), "Account.logins.0.password"),
        (Login(password=SecretBytes(b"hunter2")), "Login.password"),
        (Measured(value=float("nan")), "Measured.value"),
        (Measured(value=float("-inf")), "Measured.value"),
        (Blob(data=b"abc"), "Blob.data"),
        (Hidden(value="x"), "Hidden.value"),
        (Owner(pet=Dog(name="Rex", tricks=1)), "Owner.pet"),
        (Shouting(value="a"), "Shouting.value"),
        (Anything(value=(1, 2)), "Anything.value"),
        (Anything(value={1: 2}), "Anything.value.1"),
        (Anything(value=Decimal(1)), "Anything.value"),
        (Anything(value=dt.date(2026, 1, 1)), "Anything.value"),
        (Anything(value=Color.RED), "Anything.value"),
    ],
)
def test_a_model_that_would_come_back_changed_is_refused_with_the_field(
    model: BaseModel, where: str
) -> None:
    with pytest.raises(FileException, match=rf"^{where} would be read back") as caught:
        ModelContent[type(model)].from_content(model)  # type: ignore[misc]
    assert "hunter2" not in str(caught.value)


class Event(BaseModel):
    at: dt.datetime


@pytest.mark.parametrize(
    "at",
    [
        dt.datetime(2026, 10, 25, 2, 30, fold=0, tzinfo=ZoneInfo("Europe/Berlin")),
        dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
        dt.datetime(2026, 3, 29, 2, 30, tzinfo=ZoneInfo("Europe/Berlin")),
    ],
)
def test_a_model_keeps_a_time_of_the_hour_in_which_clocks_are_changed(at: dt.datetime) -> None:
    back = ModelContent[Event].from_content(Event(at=at)).content
    assert back.at.astimezone(dt.UTC) == at.astimezone(dt.UTC)


def test_a_model_whose_json_its_own_validator_refuses_says_what_to_do() -> None:
    class Price(BaseModel):
        value: float

    with pytest.raises(
        FileException, match=r"^Price could not .*value: .*serializer.*Nothing was sent"
    ):
        ModelContent[Price].from_content(Price(value=float("nan")), filename="p.json")


def test_a_model_of_a_subclass_is_refused() -> None:
    with pytest.raises(FileException, match=r"^Dog would be read back"):
        ModelContent[Animal].from_content(Dog(name="Rex"))


@pytest.mark.parametrize("value", ["\ud800", b"\xff", object(), 1j])
def test_a_model_without_a_json_form_is_refused(value: object) -> None:
    with pytest.raises(FileException, match="Anything"):
        ModelContent[Anything].from_content(Anything(value=value))


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({1: "a"}, "1"),
        ({"a": [{None: 1}]}, "a.0.None"),
        ({1: "a", "1": "b"}, "1"),
        ({True: 1}, "True"),
    ],
)
def test_a_value_that_json_would_change_is_refused(value: object, where: str) -> None:
    with pytest.raises(FileException, match=f"at {where}:"):
        JsonContent.from_content(value)


def test_a_value_that_json_holds_is_read_back() -> None:
    value = {"a": (1, 2.5, None, True), "b": [{}, "ü"]}
    assert JsonContent.from_content(value).content == {"a": [1, 2.5, None, True], "b": [{}, "ü"]}


@pytest.mark.parametrize(
    "url",
    [
        *("", "no url", "//host/path", "http://", "https://a b/", "https:path", "https:/path"),
        *("javascript:alert(1)", "JavaScript:alert(1)", " javascript:alert(1)", "java\nscript:x"),
        *("data:text/html,x", "vbscript:x", "file:///etc/passwd", "ftp://host/", "mailto:a@b.c"),
        *(
            "https://host/\r\nX-Other: 1",
            "https://host/\t",
            "https:\\\\host",
            "https://h/\u202egpj",
        ),
        "https://host/\ud800",
    ],
)
def test_an_unsafe_url_is_refused(url: str) -> None:
    with pytest.raises(FileException, match="scheme"):
        UrlContent.from_content(url)
    stored = UrlContent(data=url.encode(errors="surrogatepass"), filename="l.uri")
    with pytest.raises(FileException, match=r"l\.uri"):
        _ = stored.content


def test_the_schemes_of_urls_are_those_of_the_class() -> None:
    class Mail(UrlContent):
        schemes = frozenset({"mailto"})

    assert Mail.from_content("mailto:ann@example.com").content == "mailto:ann@example.com"
    assert UrlContent(data=b"HTTPS://example.com/a\r\n").content == "HTTPS://example.com/a"
    with pytest.raises(FileException, match="mailto"):
        Mail.from_content("https://example.com/")


@pytest.mark.parametrize(
    "charset",
    [
        *(
            "idna",
            "punycode",
            "unicode_escape",
            "utf-7",
            "rot13",
            "undefined",
            "hex",
            "zlib",
            "mbcs",
        ),
        *("x" * 900, "os.path", "../x", "a\\x00", "no-such"),
    ],
)
def test_text_of_a_charset_that_is_not_known_is_an_error_of_ours(charset: str) -> None:
    media_type = f"text/plain; charset={charset}"
    with pytest.raises(FileException, match="charset"):
        TextContent.from_content("a", media_type=media_type)
    stored = TextContent(data=b"a", media_type=media_type)
    with pytest.raises(FileException, match="bytes are in `data`"):
        _ = stored.content


@pytest.mark.parametrize(
    ("charset", "text"),
    [
        ("latin-1", "é"),
        ("ISO-8859-15", "€"),
        ("windows-1252", "€"),
        ("Shift_JIS", "日本"),
        ("UTF-16", "ü"),
        ('"utf-8"', "ü"),
        ("us-ascii", "a"),
        ("GB18030", "日"),
        ("koi8-r", "Я"),
    ],
)
def test_text_of_a_common_charset_comes_back(charset: str, text: str) -> None:
    file = TextContent.from_content(text, media_type=f"text/plain;charset={charset}")
    assert file.content == text


def test_an_unreadable_file_that_is_compressed_says_so() -> None:
    info = ObjectInfo(
        path=StoragePath("a"),
        size=1,
        media_type="text/plain",
        etag="e",
        sha256=None,
        created_at=dt.datetime.now(dt.UTC),
        modified_at=dt.datetime.now(dt.UTC),
        headers={"Content-Encoding": "gzip"},
    )
    for content in (TextContent, JsonContent):
        file = content.from_stored(b"\x1f\x8b", filename="a", info=info)
        with pytest.raises(FileException, match="Content-Encoding gzip: decode `data`"):
            _ = file.content


@pytest.mark.parametrize(
    "name", ["data:text/html;x,y.png", "a/data:text/html,x.png", "http://[.png"]
)
def test_a_name_that_looks_like_a_url_is_a_name(name: str) -> None:
    assert BinaryContent(data=b"?", filename=name).media_type == "image/png"


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
    assert ContentFactory.from_local_path(tmp_path / "c").media_type == "application/octet-stream"
    with pytest.raises(MediaTypeCannotBeGuessedException, match="pass media_type"):
        ContentFactory.from_bytes("", b"?")


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("a.gz", "application/gzip"),
        ("a.tar.gz", "application/gzip"),
        ("a.csv.bz2", "application/x-bzip2"),
        ("a.log", "text/plain"),
        ("a.m4a", "audio/mp4"),
        ("a.mkv", "video/x-matroska"),
        ("a.yaml", "application/yaml"),
        ("a.XLSX", "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"),
        ("a.unheard-of", "application/octet-stream"),
        ("Makefile", "application/octet-stream"),
    ],
)
def test_a_file_of_any_name_has_a_media_type_by_whatever_way_it_comes(
    name: str, media_type: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"?")
    for made in (
        FileContent.from_local_path(tmp_path / name),
        StreamContent.from_iterable([b"?"], filename=name),
        ContentFactory.from_local_path(tmp_path / name),
        BinaryContent(data=b"?", filename=name),
    ):
        assert made.media_type == media_type


def test_media_types_compare_without_case() -> None:
    assert ImageContent(data=b"", media_type="IMAGE/PNG").media_type == "IMAGE/PNG"
    assert isinstance(ContentFactory.from_bytes("Text/HTML", b""), TextContent)


def test_the_factory_does_not_fetch_urls() -> None:
    link = ContentFactory.from_url("https://unreachable.invalid/file.pdf", filename="l.uri")
    assert link.content == "https://unreachable.invalid/file.pdf"


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_what_no_local_file_can_be_called_is_refused(path: str) -> None:
    with pytest.raises(FileException, match="cannot be the path of a file"):
        FileContent.from_local_path(path)


def test_a_name_in_an_error_is_one_that_can_be_encoded() -> None:
    for make in (
        lambda: ImageContent(data=b"", filename="\ud800"),
        lambda: AudioContent(data=b"", filename="\ud800"),
    ):
        with pytest.raises(MediaTypeCannotBeGuessedException) as caught:
            make()
        assert str(caught.value).encode()


def test_a_size_that_no_store_holds_is_refused() -> None:
    with pytest.raises(FileException, match="size"):
        StreamContent.from_iterable([b""], filename="a.txt", size=10**400)
