"""The return types of repositories."""

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
    """An immutable sequence; its `repr` shows its class and its items."""

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
    """The paths that were deleted, without those that did not exist."""

    __slots__ = ()


class ListResponse(Response[StoragePath]):
    """Paths in key order: all of them, or a page of them if a `limit` was given.

    The `repr` of a page says if there are more.

    Args:
        items: the paths.
        prefixes: the common prefixes if a delimiter was given, as S3 rolls them up.
        continuation_token: pass it to `list` for the next page; None if there are no more.
        describe: returns the catalog's information about the items.
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
        """The catalog's information about each path, in order: size, times, media type, metadata."""
        return tuple(self._describe())

    @override
    def __repr__(self) -> str:
        shown = [repr(item) for item in self]
        if self.continuation_token is not None:
            shown.append("… more: continuation_token")
        return f"{type(self).__name__}[{', '.join(shown)}]"


class PresignedUrlResponse(Response[str]):
    """URLs in the order of `paths`; `repr` does not show them, since anyone who has them can use them.

    Args:
        items: the URLs.
        paths: the files that they lead to.
        headers: a client has to send them with its request, since the signature covers them.
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
    """One part of a multipart upload: the bytes of the file from `start` to `end`.

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
    """All that a client needs to upload one file directly to the store, and a token to accept the upload.

    The client sends the bytes according to `method`, `url`, `headers` and `fields`, or sends each
    of the `parts`. Afterwards, pass the ticket or only its `token` to `accept`: if the client
    changed anything else in it, that has no effect. URLs and token are secrets until they expire,
    so `repr` does not show them.

    Args:
        token: pass it to `accept`; also `str(ticket)`.
        method: `PUT`; or `POST` for a form with the `fields`, followed by the field `file`.
        url: the target; empty if there are parts.
        headers: to send with it, exactly.
        fields: of the form.
        parts: of a multipart upload: one `PUT` each, in any order.
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
    """Files in the order of the requested paths.

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
            content: the class that it must have, so that type checkers know the type of its
                `content`.

        Raises:
            FileException: there is none, there are several, or it is of another class.
        """
        if len(self) != 1:
            message = f"one() expected exactly one file, got {len(self)}."
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
