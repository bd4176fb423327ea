"""Files that users put and get: typed content with a name, a media type and metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fennflow.files.content import (
    AudioContent,
    BaseContent,
    BinaryContent,
    DocumentContent,
    ImageContent,
    JsonContent,
    TextContent,
    VideoContent,
)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        from fennflow.plugins import content_class

        return content_class(name, __name__)


__all__ = [
    "AudioContent",
    "BaseContent",
    "BinaryContent",
    "DocumentContent",
    "ImageContent",
    "JsonContent",
    "TextContent",
    "VideoContent",
]
