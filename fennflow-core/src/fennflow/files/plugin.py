"""The content types of FennFlow itself, registered through the hook that plugins use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fennflow import files
from fennflow.hookspecs import ContentTypePlugin, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def fennflow_content_types() -> Iterable[ContentTypePlugin]:
    """Return the built-in content types."""
    return [
        ContentTypePlugin("json", files.JsonContent, ("application/json",)),
        ContentTypePlugin("model", files.ModelContent),
        ContentTypePlugin("url", files.UrlContent, ("text/uri-list",)),
        ContentTypePlugin(
            "text",
            files.TextContent,
            ("text/*", "application/toml", "application/x-ndjson", "application/yaml"),
        ),
        ContentTypePlugin("image", files.ImageContent, ("image/*",)),
        ContentTypePlugin("audio", files.AudioContent, ("audio/*",)),
        ContentTypePlugin("video", files.VideoContent, ("video/*",)),
        ContentTypePlugin(
            "document",
            files.DocumentContent,
            (
                "application/pdf",
                "application/msword",
                "application/rtf",
                "application/vnd.ms-excel",
                "application/vnd.ms-powerpoint",
                "application/vnd.oasis.opendocument.presentation",
                "application/vnd.oasis.opendocument.spreadsheet",
                "application/vnd.oasis.opendocument.text",
                "application/vnd.openxmlformats-officedocument.presentationml.presentation",
                "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
                "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
            ),
        ),
        ContentTypePlugin("binary", files.BinaryContent, ("application/octet-stream",)),
    ]
