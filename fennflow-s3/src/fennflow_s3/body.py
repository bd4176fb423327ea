"""Request bodies that aiohttp sends piece by piece."""

from __future__ import annotations

import io

from typing_extensions import override


class Body(io.BytesIO):
    """A file object on bytes, which are never copied."""

    @override
    def getbuffer(self) -> memoryview:
        """Return a view of all bytes, which aiohttp uses for the size; that of `BytesIO` copies them."""
        return memoryview(self.getvalue())
