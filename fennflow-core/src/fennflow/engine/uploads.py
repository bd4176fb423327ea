"""Files on their way to a key, and what is refused of them before any I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fennflow.backends import Record, WriteId
from fennflow.connectors import ObjectAttributes, check_attributes
from fennflow.engine.stamps import Stamp, stamped
from fennflow.engine.streaming import Source
from fennflow.engine.transaction import Transaction
from fennflow.exceptions import FilepathsCollisionError
from fennflow.paths import check_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file on its way to a key.

    Args:
        key: the full key.
        body: the bytes, or what they are read from while they are sent, or the record whose bytes
            the store is to copy.
        sha256: hexadecimal, of the bytes; None if that is not known, or not yet.
        media_type: for instance `text/plain`.
        content_type: tag of the content type.
        metadata: the user's.
        extra: the user's `connector_extra`.
        on_bytes: called with the size of a body that went whole, once it is written.
    """

    key: str
    body: bytes | Source | Record
    sha256: str | None
    media_type: str
    content_type: str | None
    metadata: Mapping[str, str]
    extra: Mapping[str, Any]
    on_bytes: Callable[[int], object] | None = None

    @property
    def size(self) -> int:
        """In bytes; of a stream, once it is sent."""
        if isinstance(self.body, Source):
            return self.body.count
        return self.body.size if isinstance(self.body, Record) else len(self.body)

    @property
    def whole(self) -> bool:
        """Whether all of the body was read, so that size and checksum are its own."""
        return not isinstance(self.body, Source) or self.body.sha256 is not None

    @property
    def checksum(self) -> str | None:
        """The SHA-256; of a stream, once it is sent."""
        return self.body.sha256 if isinstance(self.body, Source) else self.sha256


def check_uploads(tx: Transaction, namespace: str, uploads: Sequence[Upload]) -> None:
    """Refuse what cannot be written, before any I/O.

    Raises:
        KeyException, MetadataException: what the key rules or the store do not allow.
        FilepathsCollisionError: two files have one key.
        FileException, ConnectorCapabilityException: a media type or an option that is not one.
    """
    by_key = {upload.key: upload for upload in uploads}
    for upload in uploads:
        check_key(upload.key, reserved_prefix=tx.config.reserved_prefix)
        if by_key[upload.key] is not upload:
            message = (
                f"Two files of this call are named {upload.key}; nothing was sent. "
                "Give them different filenames."
            )
            raise FilepathsCollisionError(message)
        check_beside(tx, namespace, upload)


def check_beside(tx: Transaction, namespace: str, upload: Upload) -> None:
    """Reject attributes that cannot be stored, before any I/O."""
    # The sequence is not known yet; no transaction gets to one with more digits.
    attributes = attributes_of(tx, upload, seq=10**9)
    check_attributes(attributes)
    tx.connector.validate(namespace, upload.key, attributes)


def attributes_of(
    tx: Transaction, upload: Upload, seq: int, *, staged: bool = False
) -> ObjectAttributes:
    """Return the attributes of a write: the user's, and the stamp (P11).

    Args:
        tx: the transaction.
        upload: the file.
        seq: of the write.
        staged: whether the bytes are on their way, without what only the object at its key may have.
    """
    write = WriteId(tx.transaction_id, seq)
    stamp = Stamp(write, upload.content_type, upload.sha256, tx.backend.stamped_id)
    left_out = tx.connector.at_the_key_only if staged else frozenset[str]()
    return ObjectAttributes(
        media_type=upload.media_type,
        metadata=stamped(upload.metadata, stamp),
        sha256=upload.sha256,
        extra={name: value for name, value in upload.extra.items() if name not in left_out},
    )
