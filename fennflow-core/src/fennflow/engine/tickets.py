"""Tickets: what a client may upload to which key, signed by the catalog.

A client keeps the ticket, so it is checked when it comes back. It contains a code that can be computed
only with the catalog's key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import asdict, dataclass

from fennflow.exceptions import UploadTicketException

DIRECTORY = "uploads"
"""Of a catalog's directory under the reserved prefix."""

_DOMAIN = b"fennflow upload ticket 1\n"
_MAX_CHARACTERS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """The permission for one upload.

    Args:
        ticket_id: the id; with sequence 1 it identifies the upload like a write.
        staging_key: the key to which the bytes are uploaded.
        namespace: of the file.
        key: of the file.
        deadline: seconds since the epoch after which it is not accepted.
        max_size: the largest size in bytes.
        size: in bytes; None for any up to `max_size`.
        media_type: the media type; None for any.
        sha256: hexadecimal; None for any bytes.
        upload_id: of a multipart upload.
        part_size: the size of all its parts except the last, in bytes.
    """

    ticket_id: str
    staging_key: str
    namespace: str
    key: str
    deadline: int
    max_size: int
    size: int | None = None
    media_type: str | None = None
    sha256: str | None = None
    upload_id: str | None = None
    part_size: int = 0

    @property
    def part_sizes(self) -> list[int]:
        """The sizes of the parts of a multipart upload: an empty file is one empty part."""
        size, step = self.size or 0, max(self.part_size, 1)
        return [min(step, size - start) for start in range(0, size, step)] or [0]


def ticket_key(reserved_prefix: str, catalog_id: str, ticket_id: str, deadline: int) -> str:
    """Return the staging key of an upload; the sweep reads the deadline from it (P32)."""
    return f"{reserved_prefix}/{catalog_id}/{DIRECTORY}/{deadline}/{ticket_id}"


def signed(ticket: Ticket, key: bytes) -> str:
    """Return a ticket as text that cannot be changed without the key."""
    left_out = {name: value for name, value in asdict(ticket).items() if value is not None}
    payload = _text(json.dumps(left_out, separators=(",", ":")).encode())
    return f"{payload}.{_code(payload, key)}"


def opened(token: object, key: bytes) -> Ticket:
    """Parse a ticket.

    Raises:
        UploadTicketException: this catalog did not make it.
    """
    payload, _, code = token.partition(".") if isinstance(token, str) else ("", "", "")
    right = len(payload) < _MAX_CHARACTERS and payload.isascii() and code.isascii()
    if not (right and hmac.compare_digest(_code(payload, key), code)):
        message = (
            "This is not an upload ticket of this catalog. Nothing was accepted. Pass "
            "the ticket, or its token, as upload_ticket() returned it. (A catalog in memory knows "
            "only the tickets of its own process.)"
        )
        raise UploadTicketException(message)
    return Ticket(**json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))))


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _code(payload: str, key: bytes) -> str:
    return _text(hmac.new(key, _DOMAIN + payload.encode(), hashlib.sha256).digest())
