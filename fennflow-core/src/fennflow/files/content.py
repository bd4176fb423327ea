"""The built-in content types."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from inspect import getattr_static
from typing import Annotated, Any, ClassVar, Never, Self, cast

from pydantic import (
    AnyUrl,
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic import ConfigDict as PydanticConfigDict
from typing_extensions import override

from fennflow.connectors.headers import MEDIA_TYPE
from fennflow.exceptions import FileException, MediaTypeCannotBeGuessedException, MetadataException
from fennflow.files import media_types
from fennflow.files.charsets import codec_of
from fennflow.files.info import ObjectInfo
from fennflow.files.round_trips import first_difference, first_fault
from fennflow.paths import StoragePath
from fennflow.printable import brief, printable

MAX_METADATA_BYTES = 2048
"""The limit of S3, names and values together, in UTF-8."""

_URL = TypeAdapter(AnyUrl, config=PydanticConfigDict(defer_build=True))


class FileBase(BaseModel):
    """Base class of files in memory and streams, which are validated when they are made.

    Raises:
        MetadataException: more metadata than stores hold.
        FileException: a field of the wrong type.
    """

    # Built at first use: a starting program needs few of the classes, or none.
    model_config = PydanticConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    media_type_families: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *given: Never, **values: Any) -> None:
        if given:
            message = f"{type(self).__name__} takes arguments by name. {_how_to_make(type(self))}"
            raise FileException(message)
        try:
            super().__init__(**values)
        except ValidationError as error:
            message = f"{type(self).__name__} cannot hold this: {reasons_of(error)}"
            if any(detail["loc"] == ("data",) for detail in error.errors(include_url=False)):
                message += f". {_how_to_make(type(self))}"
            raise FileException(message) from None

    @field_validator("metadata", check_fields=False)
    @classmethod
    def _check_metadata(cls, metadata: Mapping[str, str]) -> Mapping[str, str]:
        check_metadata(metadata)
        return metadata

    @field_validator("media_type", check_fields=False)
    @classmethod
    def _check_media_type(cls, media_type: str) -> str:
        if re.fullmatch(MEDIA_TYPE, media_type) is None:
            message = f"{brief(media_type)} is not a media type, such as text/plain"
            raise ValueError(message)
        families = cls.media_type_families
        if families and not media_type.lower().startswith(families):
            message = f"{media_type} is not one of {', '.join(f'{each}*' for each in families)}"
            raise ValueError(message)
        return media_type


def _how_to_make(cls: type[FileBase]) -> str:
    names = [
        f"{cls.__name__}.{name}(...)"
        for name in ("from_content", "from_local_path", "from_iterable")
        if isinstance(getattr_static(cls, name, None), classmethod)
    ]
    bytes_of = [f'{cls.__name__}(data=b"...", filename="...")']
    return f"Write {' or '.join(names or bytes_of)}."


def reasons_of(error: ValidationError) -> str:
    """Return what pydantic found wrong, each with the name of its field."""
    return "; ".join(
        ": ".join(
            part
            for part in (
                ".".join(map(str, detail["loc"])),
                detail["msg"].removeprefix("Value error, "),
            )
            if part
        )
        for detail in error.errors(include_input=False, include_context=False)
    )


class BaseContent(FileBase):
    """Bytes with a name, a media type and metadata: what every content type extends.

    Args:
        data: the bytes as stored.
        filename: path relative to the scope of the `put`; without one, the file is named by the
            SHA-256 of its bytes and the extension of its media type.
        media_type: by default detected from the name's extension or the first bytes; otherwise
            `application/octet-stream` if it has a name.
        metadata: the user's own, any Unicode; S3 takes about 1,800 bytes of ASCII, and a third as many other
            characters. Names that start with `fennflow_`
            are FennFlow's.
        path: of a file that was read.
        info: of a file that was read, the catalog's information about it.

    Raises:
        MediaTypeCannotBeGuessedException: no media type was given, and none can be detected from
            name and bytes: for a file without a name, an image, audio or video.
        MetadataException: more metadata than stores hold.
        FileException: a field of the wrong type.
    """

    default_media_type: ClassVar[str | None] = None

    data: Annotated[bytes, Field(repr=False)]
    filename: str | None = None
    media_type: str = ""
    metadata: Mapping[str, str] = Field(default_factory=dict[str, str])
    path: Annotated[StoragePath | None, Field(exclude=True)] = None
    info: Annotated[ObjectInfo | None, Field(exclude=True, repr=False)] = None

    @model_validator(mode="before")
    @classmethod
    def _guess_media_type(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("media_type"):
            return values
        name, data = values.get("filename"), values.get("data")
        guess = cls.default_media_type
        if isinstance(name, str):
            guess = media_types.from_name(name) or guess
        if guess is None and isinstance(data, bytes):
            guess = media_types.from_bytes(data)
        if guess is None and name and not cls.media_type_families:
            guess = media_types.ANY
        if guess is None:
            shown = printable(str(name)) if name else "a file without a name"
            message = (
                f"The media type of {shown} cannot be detected from its name or bytes: pass media_type "
                f"{'' if name else 'or filename '}to {cls.__name__}."
            )
            raise MediaTypeCannotBeGuessedException(message)
        return {**values, "media_type": guess}

    @property
    def content(self) -> Any:
        """The decoded value: a `str` for text, the value for JSON, otherwise the bytes."""
        return self.data

    @property
    def _name(self) -> str:
        return self.path or self.filename or "The file"

    def _unreadable(self, error: Exception, kind: str) -> FileException:
        """Return the error for bytes that cannot be decoded as a kind of content."""
        coding = None if self.info is None else self.info.headers.get("Content-Encoding")
        hint = f" It is stored with Content-Encoding {coding}: decode `data`." if coding else ""
        return FileException(f"{self._name} cannot be read as {kind}: {error}.{hint}")

    def as_text(self) -> str:
        """Return the bytes as text: UTF-8, or the charset that the media type names.

        Raises:
            FileException: the bytes are not text of the charset, or it is not known.
        """
        try:
            return self.data.decode(codec_of(self.media_type))
        except UnicodeError as error:
            raise self._unreadable(error, "text") from error

    def as_json(self) -> Any:
        """Return the bytes as a JSON value.

        Raises:
            FileException: the bytes are not JSON.
        """
        try:
            return json.loads(self.data)
        except (ValueError, RecursionError) as error:
            raise self._unreadable(error, "JSON") from error

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @classmethod
    def variant(cls) -> str | None:
        """Return what distinguishes this class from other subclasses with its tag.

        It is stored with the tag, so that `from_variant` finds the class again. With None, the
        default, a file that was put as a subclass is read back as the registered class.
        """
        return None

    @classmethod
    def from_variant(cls, variant: str) -> type[BaseContent] | None:
        """Return the class with a variant; None if this process does not know it.

        Args:
            variant: as stored, so it is not trusted: look it up, and import nothing by it.
        """
        del variant
        return None

    @classmethod
    def from_stored(cls, data: bytes, *, filename: str, info: ObjectInfo) -> Self:
        """Build the content from stored bytes, without validating them again."""
        return cls.model_construct(  # type: ignore[return-value]  # its stub says BaseModel
            data=data,
            filename=filename,
            media_type=info.media_type,
            metadata=info.metadata,
            path=info.path,
            info=info,
        )


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Refuse metadata that no store holds.

    Raises:
        MetadataException: more than stores hold, a reserved or empty name, lone surrogates.
    """
    try:
        size = sum(len(name.encode()) + len(value.encode()) for name, value in metadata.items())
    except UnicodeEncodeError:
        message = "Metadata has a lone surrogate, which UTF-8 cannot hold."
        raise MetadataException(message) from None
    if size > MAX_METADATA_BYTES:
        message = f"Metadata has {size} bytes; stores take at most {MAX_METADATA_BYTES}."
        raise MetadataException(message)
    for name in metadata:
        if not name or name.lower().startswith("fennflow_"):
            message = f"Metadata cannot have the name {name!r}: it is empty or FennFlow's own."
            raise MetadataException(message)


class TextContent(BaseContent):
    """Text, stored as UTF-8 unless its media type names another charset.

    The charsets that browsers know are supported (UTF-8, UTF-16, ISO 8859, Windows code pages, and
    the usual ones of Chinese, Japanese, Korean and Cyrillic); for any other, read `data`.

    Example:
        ```python
        from fennflow.files import TextContent

        greeting = TextContent.from_content("Grüezi", filename="greeting.txt")
        print(greeting.media_type, greeting.content)
        #> text/plain Grüezi
        ```
    """

    default_media_type = "text/plain"

    @classmethod
    def from_content(
        cls,
        text: str,
        *,
        filename: str | None = None,
        media_type: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """Build it from text.

        Raises:
            FileException: the charset is not known, or cannot hold the text.
        """
        if not isinstance(cast("object", text), str):
            message = (
                f"The text is a {type(text).__name__}, not a str. Bytes are a BinaryContent(data=...), and "
                "what JSON can hold is a JsonContent."
            )
            raise FileException(message)
        try:
            codec = codec_of(media_type)
            data = text.encode(codec)
        except UnicodeError as error:
            message = f"The text cannot be encoded: {error}"
            raise FileException(message) from error
        if codec != "utf_8" and data.decode(codec, errors="replace") != text:
            message = f"Text in {codec} would be read back as another text; use UTF-8."
            raise FileException(message)
        return cls(data=data, filename=filename, media_type=media_type, metadata=metadata or {})

    @property
    @override
    def content(self) -> str:
        """The text.

        Raises:
            FileException: the bytes are not text of the charset, or it is not known.
        """
        return self.as_text()


class JsonContent(BaseContent):
    """A JSON value, stored as compact UTF-8.

    Example:
        ```python
        from fennflow.files import JsonContent

        numbers = JsonContent.from_content({"π": 3.14})
        print(numbers.data.decode(), numbers.content["π"])
        #> {"π":3.14} 3.14
        ```
    """

    default_media_type = "application/json"

    @classmethod
    def from_content(
        cls,
        value: object,
        *,
        filename: str | None = None,
        media_type: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """Build it from a value.

        Raises:
            FileException: the value is not JSON, for instance has a NaN or a key that is not text.
        """
        try:
            data = _json_of(value)
            back = json.loads(data)
            where = None if back == value else first_difference(value, back, json=True)
        except (TypeError, ValueError, RecursionError) as error:
            place = first_fault(value, _json_of, json=True)
            message = f"Value is not JSON-serialisable, at {place or 'its root'}: {error}. Nothing was sent."
            raise FileException(message) from error
        if where is not None:
            message = (
                f"The value would be read back as another one, at {where or 'its root'}: keys in JSON "
                "are text, and classes of Python are lost. Nothing was sent."
            )
            raise FileException(message)
        return cls(data=data, filename=filename, media_type=media_type, metadata=metadata or {})

    @property
    @override
    def content(self) -> Any:
        """The value.

        Raises:
            FileException: the bytes are not JSON.
        """
        return self.as_json()


def _json_of(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class UrlContent(BaseContent):
    """A URL, stored as text; it is not fetched.

    Only `http` and `https` are accepted, when it is made and when it is read: a `javascript:` URL
    in a stored URL would run in the page that shows it as a link. A subclass may name
    other `schemes`.

    Example:
        ```python
        from fennflow.files import UrlContent

        link = UrlContent.from_content("https://example.com/a?b=c", filename="link.uri")
        print(link.media_type, link.content)
        #> text/uri-list https://example.com/a?b=c
        ```
    """

    default_media_type = "text/uri-list"
    schemes: ClassVar[frozenset[str]] = frozenset({"http", "https"})

    @classmethod
    def from_content(
        cls,
        url: str,
        *,
        filename: str | None = None,
        media_type: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """Build it from a URL.

        Raises:
            FileException: it is not a URL, or its scheme is not one of `schemes`.
        """
        data = cls._checked(url, "This").encode()
        return cls(data=data, filename=filename, media_type=media_type, metadata=metadata or {})

    @property
    @override
    def content(self) -> str:
        """The URL.

        Raises:
            FileException: the bytes are not a URL, or its scheme is not one of `schemes`.
        """
        try:
            url = self.data.decode()
        except UnicodeDecodeError as error:
            raise self._unreadable(error, "a URL") from error
        # Lines of a URL list end with CRLF; a file with one line is a URL.
        return self._checked(url.removesuffix("\n").removesuffix("\r"), self._name)

    @classmethod
    def _checked(cls, url: object, name: str) -> str:
        """Return the URL, if it is one and safe to link to."""
        if isinstance(url, str) and url.isprintable() and " " not in url and "\\" not in url:
            try:
                scheme = _URL.validate_python(url).scheme
            except ValueError:
                scheme = ""
            # Without the slashes, browsers treat the rest as a path on the current site.
            whole = scheme not in {"http", "https"} or url.lower().startswith(f"{scheme}://")
            if scheme in cls.schemes and whole:
                return url
        message = (
            f"{name} is not a URL with a scheme of {', '.join(sorted(cls.schemes))}, as in "
            "https://host/path, without spaces and line breaks."
        )
        raise FileException(message)


class BinaryContent(BaseContent):
    """Bytes of any media type."""

    @property
    @override
    def content(self) -> bytes:
        """The bytes."""
        return self.data


def _from_local_path(*_: object, **__: object) -> None:
    """Say what to use in place of the constructor of fennflow 0.8."""
    from fennflow._migration import renamed

    raise FileException(renamed("fennflow.files.BinaryContent.from_local_path"))


def _from_content(*_: object, **__: object) -> None:
    """Say what to write for a class whose content is bytes."""
    message = (
        "This class has no from_content, since its content is bytes. Give them to the class itself: "
        'BinaryContent(data=b"...", filename="...").'
    )
    raise FileException(message)


setattr(BaseContent, "from_local_path", _from_local_path)  # noqa: B010 - not of the interface
setattr(BaseContent, "from_content", _from_content)  # noqa: B010 - not of the interface


class ImageContent(BinaryContent):
    """An image."""

    media_type_families = ("image/",)


class AudioContent(BinaryContent):
    """Audio."""

    media_type_families = ("audio/",)


class VideoContent(BinaryContent):
    """A video."""

    media_type_families = ("video/",)


class DocumentContent(BinaryContent):
    """A document such as a PDF."""
