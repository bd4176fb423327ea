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
    UrlContent,
    VideoContent,
)
from fennflow.files.factory import ContentFactory
from fennflow.files.model import ModelContent
from fennflow.files.stream import FileContent, StreamContent
from fennflow.plugins import content_class

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        return content_class(name, __name__)


__all__ = [
    "AudioContent",
    "BaseContent",
    "BinaryContent",
    "ContentFactory",
    "DocumentContent",
    "FileContent",
    "ImageContent",
    "JsonContent",
    "ModelContent",
    "StreamContent",
    "TextContent",
    "UrlContent",
    "VideoContent",
]
