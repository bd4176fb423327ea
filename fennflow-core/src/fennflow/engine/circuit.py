"""Buckets that do not respond: apply and compensation wait before they send to them again (P9)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fennflow.exceptions import BaseConnectorException, ConnectorUnavailableException
from fennflow.telemetry import log_event

MISSES = 2
"""How many requests in a row without a response make a bucket count as unreachable."""
FIRST_REST, LONGEST_REST = 0.5, 10.0
"""Seconds for which work that can wait sends nothing to a bucket that does not respond."""

CLOSING_WITHIN = 5.0
"""Seconds for which closing waits for a bucket that did not answer the last request."""


@dataclass(slots=True)
class _Bucket:
    misses: int = 0
    rest_until: float = 0.0


@dataclass(slots=True)
class Circuit:
    """Tracks buckets that do not respond, so that apply and undo do not send to them again and again.

    A connector retries a request itself before it fails. Requests of user calls are always sent.
    """

    _buckets: dict[str, _Bucket] = field(default_factory=dict[str, _Bucket])

    def last_wait(self, longest: float) -> float:
        """Return how many seconds closing may wait, and allow one more request to every bucket.

        Args:
            longest: while the buckets answer.
        """
        away = bool(self._buckets)
        self.reset()
        return min(longest, CLOSING_WITHIN) if away else longest

    def is_open(self, namespace: str) -> bool:
        """Return whether requests to a bucket have to wait now."""
        bucket = self._buckets.get(namespace)
        return bucket is not None and asyncio.get_running_loop().time() < bucket.rest_until

    def check(self, namespace: str) -> None:
        """Refuse to send to a bucket that does not respond.

        Raises:
            ConnectorUnavailableException: it does not respond; nothing was sent.
        """
        if self.is_open(namespace):
            message = f"{namespace} does not respond; requests are sent again in a few seconds."
            raise ConnectorUnavailableException(message, ambiguous=False)

    @contextmanager
    def request(self, namespace: str) -> Generator[None]:
        """Let the block send a request to a bucket, and note whether it was answered."""
        try:
            yield
        except ConnectorUnavailableException as error:
            self._missed(namespace, error)
            raise
        except BaseConnectorException:
            self._buckets.pop(namespace, None)
            raise
        self._buckets.pop(namespace, None)

    def _missed(self, namespace: str, error: ConnectorUnavailableException) -> None:
        bucket = self._buckets.setdefault(namespace, _Bucket())
        if self.is_open(namespace):
            return  # it was sent before the bucket counted as unreachable
        bucket.misses += 1
        if bucket.misses < MISSES:
            return
        rest = min(LONGEST_REST, FIRST_REST * 2 ** min(bucket.misses - MISSES, 10))
        bucket.rest_until = asyncio.get_running_loop().time() + rest
        message = "%s does not respond; requests that can wait are sent in %.1f s: %s"
        log_event(logging.WARNING, message, namespace, rest, error, rule="P9")

    def reset(self) -> None:
        """Allow requests to all buckets again, immediately."""
        self._buckets.clear()
