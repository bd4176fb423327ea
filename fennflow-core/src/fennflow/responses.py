"""What repositories return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Generic, Literal, TypeVar, cast, overload

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import override

from fennflow.exceptions import FileException
from fennflow.files import (
    AudioContent,
    BaseContent,
    DocumentContent,
    ImageContent,
    JsonContent,
    TextContent,
    VideoContent,
)
from fennflow.files.info import ObjectInfo
from fennflow.paths import StoragePath

__all__ = [
    "DeleteResponse",
    "ListResponse",
    "MediaResponse",
    "ObjectInfo",
    "PresignedUrlResponse",
    "PutResponse",
    "UploadPart",
    "UploadTicket",
]

T = TypeVar("T")
C = TypeVar("C", bound=BaseContent)


class Response(Sequence[T], Generic[T]):
    """An immutable sequence that prints as its class and what it holds."""

    __slots__ = ("_items",)

    def __init__(self, items: Sequence[T] = ()) -> None:
        self._items = tuple(items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    @override
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        return self._items[index]

    @override
    def __len__(self) -> int:
        return len(self._items)

    @override
    def __eq__(self, other: object) -> bool:
        if isinstance(other, (Response, list, tuple)):
            return self._items == tuple(cast("Sequence[object]", other))
        return NotImplemented

    @override
    def __hash__(self) -> int:
        return hash(self._items)

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}[{', '.join(map(repr, self._items))}]"


class PutResponse(Response[StoragePath]):
    """The paths that were written, in the order of the files."""

    __slots__ = ()


class DeleteResponse(Response[StoragePath]):
    """The paths that were deleted; those that did not exist are not among them."""

    __slots__ = ()


class ListResponse(Response[StoragePath]):
    """Paths in key order: all that were asked for, or a page of them if a `limit` was given.

    Its `repr` says if there are more behind a page.

    Args:
        items: the paths.
        prefixes: with a delimiter, what the paths beyond it have in common, as S3 rolls them up.
        continuation_token: what `list` takes to return the next page; None if there are no more.
        describe: returns what the catalog says of the items.
    """

    __slots__ = ("_describe", "continuation_token", "prefixes")

    def __init__(
        self,
        items: Sequence[StoragePath] = (),
        *,
        prefixes: Sequence[StoragePath] = (),
        continuation_token: str | None = None,
        describe: Callable[[], Sequence[ObjectInfo]] = tuple,
    ) -> None:
        super().__init__(items)
        self.prefixes = tuple(prefixes)
        self.continuation_token = continuation_token
        self._describe = describe

    @property
    def infos(self) -> Sequence[ObjectInfo]:
        """What the catalog says of each path: size, times, media type, metadata; in their order."""
        return tuple(self._describe())

    @override
    def __repr__(self) -> str:
        shown = [repr(item) for item in self]
        if self.continuation_token is not None:
            shown.append("… more: continuation_token")
        return f"{type(self).__name__}[{', '.join(shown)}]"


class PresignedUrlResponse(Response[str]):
    """URLs in the order of `paths`; not shown by `repr`, since any holder may use them.

    Args:
        items: the URLs.
        paths: what they lead to.
        headers: what a client has to send with its request, since it is signed.
    """

    __slots__ = ("headers", "paths")

    def __init__(
        self,
        items: Sequence[str] = (),
        *,
        paths: Sequence[StoragePath] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(items)
        self.paths = tuple(paths)
        self.headers = dict(headers or {})

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}[{', '.join(map(repr, self.paths))}]"


class UploadPart(BaseModel):
    """One part of an upload in parts: the bytes of the file from `start` to `end`.

    Args:
        url: where to PUT them.
        start: the first byte, counted from 0.
        end: the byte before which to stop.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(repr=False)
    start: int
    end: int


class UploadTicket(BaseModel):
    """What a client needs to upload one file directly to the store, and what brings it back.

    The client sends the bytes as `method`, `url`, `headers` and `fields` say, or each of the
    `parts`. Afterwards `accept` takes the ticket, or its `token` alone: whatever else a client
    has changed in it has no effect. URLs and token are secrets until they expire, so `repr` shows
    none of them.

    Args:
        token: what `accept` takes; also `str(ticket)`.
        method: `PUT`; or `POST` of a form with the `fields` and, behind them, the field `file`.
        url: where to; empty if there are parts.
        headers: to send with it, exactly.
        fields: of the form.
        parts: of an upload in parts: a `PUT` each, in any order.
        expires_at: when the URLs expire, UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str = Field(repr=False)
    method: Literal["PUT", "POST"] = "PUT"
    url: str = Field(default="", repr=False)
    headers: dict[str, str] = Field(default_factory=dict, repr=False)
    fields: dict[str, str] = Field(default_factory=dict, repr=False)
    parts: tuple[UploadPart, ...] = ()
    expires_at: datetime

    @override
    def __str__(self) -> str:
        return self.token


class MediaResponse(Response["BaseContent"]):
    """Files in the order asked.

    Example:
        ```python
        from fennflow.files import JsonContent, TextContent
        from fennflow.responses import MediaResponse

        files = MediaResponse([TextContent.from_content("a"), JsonContent.from_content(1)])
        print(len(files.texts), files.filter(JsonContent)[0].content)
        #> 1 1
        ```
    """

    __slots__ = ()

    def filter(self, content: type[C]) -> tuple[C, ...]:
        """Return the files of a class."""
        return tuple(item for item in self if isinstance(item, content))

    @overload
    def one(self) -> BaseContent: ...
    @overload
    def one(self, content: type[C]) -> C: ...
    def one(self, content: type[BaseContent] | None = None) -> BaseContent:
        """Return the only file.

        Args:
            content: the class that it has to be of, so that type checkers know its `content`.

        Raises:
            FileException: there is none, there are several, or it is of another class.
        """
        if len(self) != 1:
            message = f"one() expected exactly one file, and there are {len(self)}."
            raise FileException(message)
        if content is not None and not isinstance(self[0], content):
            message = f"{self[0].path} is {type(self[0]).__name__}, not {content.__name__}."
            raise FileException(message)
        return self[0]

    @property
    def texts(self) -> tuple[TextContent, ...]:
        """The files that are `TextContent`."""
        return self.filter(TextContent)

    @property
    def jsons(self) -> tuple[JsonContent, ...]:
        """The files that are `JsonContent`."""
        return self.filter(JsonContent)

    @property
    def images(self) -> tuple[ImageContent, ...]:
        """The files that are `ImageContent`."""
        return self.filter(ImageContent)

    @property
    def audios(self) -> tuple[AudioContent, ...]:
        """The files that are `AudioContent`."""
        return self.filter(AudioContent)

    @property
    def videos(self) -> tuple[VideoContent, ...]:
        """The files that are `VideoContent`."""
        return self.filter(VideoContent)

    @property
    def documents(self) -> tuple[DocumentContent, ...]:
        """The files that are `DocumentContent`."""
        return self.filter(DocumentContent)
