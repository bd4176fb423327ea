"""Builds content of the class that is registered for a media type."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from fennflow.exceptions import FileException, MediaTypeCannotBeGuessedException
from fennflow.files import media_types
from fennflow.files.content import BaseContent, BinaryContent, UrlContent
from fennflow.plugins import registry


class ContentFactory:
    """Builds content of the class that is registered for a media type.

    Example:
        ```python
        from fennflow.files import ContentFactory

        print(type(ContentFactory.from_bytes("text/css", b"p {}")).__name__)
        #> TextContent
        ```
    """

    @staticmethod
    def from_bytes(
        media_type: str,
        data: bytes,
        *,
        filename: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> BaseContent:
        """Build content from bytes.

        Args:
            media_type: for instance `text/css`; if empty, it is detected from the name's extension
                or the first bytes; otherwise it is `application/octet-stream` if there is a name.
            data: the bytes.
            filename: path relative to the scope of the `put`.
            metadata: the user's own.

        Raises:
            MediaTypeCannotBeGuessedException: there is no name, and no media type can be detected
                from the bytes.
            FileException: the content is not valid for its class.
        """
        guess = media_type or (media_types.from_name(filename) if filename else None)
        guess = guess or media_types.from_bytes(data) or (media_types.ANY if filename else None)
        if guess is None:
            message = "The media type of a file without a name is not known: pass media_type."
            raise MediaTypeCannotBeGuessedException(message)
        content = registry().content_class(None, guess) or BinaryContent
        return content(data=data, media_type=guess, filename=filename, metadata=metadata or {})

    @staticmethod
    def from_local_path(
        path: str | PathLike[str],
        media_type: str = "",
        *,
        filename: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> BaseContent:
        """Build content from a local file; this reads the whole file, and blocks meanwhile.

        Args:
            path: of the file.
            media_type: like that of `from_bytes`.
            filename: the file's own name by default.
            metadata: the user's own.

        Raises:
            FileException: the file cannot be read.
        """
        local = Path(path)
        try:
            data = local.read_bytes()
        except OSError as error:
            message = f"{local} cannot be read: {error.strerror or error}"
            raise FileException(message) from error
        name = local.name if filename is None else filename
        return ContentFactory.from_bytes(media_type, data, filename=name, metadata=metadata)

    @staticmethod
    def from_url(
        url: str, *, filename: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> UrlContent:
        """Build content that is a URL; nothing is fetched.

        Raises:
            FileException: it is not a URL.
        """
        return UrlContent.from_content(url, filename=filename, metadata=metadata)
