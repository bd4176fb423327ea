"""Bodies of requests that aiohttp sends piece by piece."""

from __future__ import annotations

import io

from typing_extensions import override


class Body(io.BytesIO):
    """Bytes as a file; its bytes are those that it was made of, and are never copied."""

    @override
    def getbuffer(self) -> memoryview:
        """Return a view of all bytes, of which aiohttp asks for the size: that of `BytesIO` copies them."""
        return memoryview(self.getvalue())
