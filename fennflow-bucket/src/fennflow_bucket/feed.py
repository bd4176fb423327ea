"""The feed of commits, read from the log, whose entries are in the order of the commits (P38)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from fennflow.backends import CommittedTransaction, bad_cursor
from fennflow_bucket.log import DAMAGE
from fennflow_bucket.rows import EPOCH, MICROSECOND, key_of, record_of

if TYPE_CHECKING:
    from fennflow_bucket.log import LogEntry
    from fennflow_bucket.replica import Replica

DIGEST_DIGITS = 16
_CURSOR = re.compile(r"([0-9]{1,18})\.([0-9]{1,9})\.([0-9a-f]{0,16})")


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the feed.

    Args:
        position: the position of the next entry to read.
        skipped: how many of its commits come before this place.
        before: the digest of the entry before it, or its beginning; it shows whether the cursor
            belongs to this log. Empty if it is not known.
    """

    position: int
    skipped: int = 0
    before: str = ""

    @classmethod
    def of(cls, cursor: str) -> Place:
        """Return the place of a cursor.

        Raises:
            CursorException: it is not a cursor.
        """
        found = _CURSOR.fullmatch(cursor)
        if found is None:
            raise bad_cursor(cursor)
        return cls(int(found[1]), int(found[2]), found[3])

    @property
    def cursor(self) -> str:
        """The cursor of this place, for users."""
        return f"{self.position}.{self.skipped}.{self.before[:DIGEST_DIGITS]}"


async def commits(
    replica: Replica, after: str | None, limit: int
) -> Sequence[CommittedTransaction]:
    """Implement `Backend.commits`."""
    given = None if after is None else Place.of(after)
    end = await replica.current_position()
    place = given or Place(await replica.first_kept())
    if place.position > end.number:
        # It is the end of the feed, if the cursor belongs to this log.
        if place.position > end.number + 1 or not end.last.startswith(place.before):
            raise bad_cursor(place.cursor)
        return []
    found: list[CommittedTransaction] = []
    while place.position <= end.number and len(found) < limit:
        read = await replica.entries(place.position, end.number)
        if read is None and found:
            break
        if read is None and given is None:
            return await commits(replica, None, limit)  # the first entry was removed meanwhile
        if read is None or (read.before and not _digest(read.before).startswith(place.before)):
            raise bad_cursor(place.cursor)
        for body, entry in read.entries:
            digest = _digest(body)
            try:
                made = list(_commits_of(entry, place.before, digest))
            except DAMAGE as error:
                raise replica.unreadable(error) from error
            if place.skipped >= max(len(made), 1):
                raise bad_cursor(place.cursor)
            found += made[place.skipped :]
            place = Place(entry.position + 1, before=digest)
    return found[:limit]


async def last_cursor(replica: Replica) -> str:
    """Return the cursor of the end."""
    end = await replica.current_position()
    return Place(end.number + 1, before=end.last).cursor


def _digest(body: bytes) -> str:
    return sha256(body).hexdigest()


def _commits_of(entry: LogEntry, before: str, digest: str) -> Iterator[CommittedTransaction]:
    """Return the commits of an entry.

    Args:
        entry: the entry.
        before: digest of the entry before it.
        digest: of this one.
    """
    made = [
        arguments
        for name, arguments in entry.commands
        if name == "commit" and (arguments["records"] or arguments["removed"])
    ]
    for number, arguments in enumerate(made, 1):
        place = Place(entry.position, number, before)
        if number == len(made):
            place = Place(entry.position + 1, before=digest)
        if not isinstance(arguments["id"], str):
            message = "it is not the id of a transaction"
            raise TypeError(message)
        yield CommittedTransaction(
            cursor=place.cursor,
            transaction_id=arguments["id"],
            committed_at=EPOCH + entry.at * MICROSECOND,
            records=[record_of(row) for row in arguments["records"]],
            removed=[key_of(row) for row in arguments["removed"]],
        )
