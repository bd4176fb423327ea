"""Idempotent requests, sent again while the store is unavailable (P9)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from fennflow.backends import ObjectKey
from fennflow.engine.leases import Lease
from fennflow.exceptions import (
    BaseConnectorException,
    ConnectorUnavailableException,
    PreconditionFailedException,
)
from fennflow.retries import repeat
from fennflow.telemetry import log_event

R = TypeVar("R")

ATTEMPTS = 4
MISSES = 2
"""Requests in a row that a bucket does not answer until it counts as away."""
FIRST_REST, LONGEST_REST = 0.5, 10.0
"""Seconds for which a bucket that is away is not asked by those who can wait."""

CLOSING_WITHIN = 5.0
"""Seconds for which closing waits for a bucket that did not answer the last request."""


@dataclass(slots=True)
class _Bucket:
    misses: int = 0
    rest_until: float = 0.0


@dataclass(slots=True)
class Circuit:
    """Which buckets do not answer, so that apply and undo do not ask them again and again.

    A connector repeats a request itself before it fails. What the user calls is always sent.
    """

    _buckets: dict[str, _Bucket] = field(default_factory=dict[str, _Bucket])

    def last_wait(self, longest: float) -> float:
        """Return the seconds for which closing may wait, and let it ask all buckets once more.

        Args:
            longest: while the buckets answer.
        """
        away = bool(self._buckets)
        self.reset()
        return min(longest, CLOSING_WITHIN) if away else longest

    def is_open(self, namespace: str) -> bool:
        """Return whether a bucket is not to be asked now."""
        bucket = self._buckets.get(namespace)
        return bucket is not None and asyncio.get_running_loop().time() < bucket.rest_until

    def check(self, namespace: str) -> None:
        """Refuse to ask a bucket that is away.

        Raises:
            ConnectorUnavailableException: it is; nothing was sent.
        """
        if self.is_open(namespace):
            message = f"{namespace} does not answer; it is asked again in a few seconds."
            raise ConnectorUnavailableException(message, ambiguous=False)

    def note(self, namespace: str, error: BaseException | None = None) -> None:
        """Note how a request ended: with an error, or without one."""
        if not isinstance(error, ConnectorUnavailableException):
            self._buckets.pop(namespace, None)
            return
        bucket = self._buckets.setdefault(namespace, _Bucket())
        if self.is_open(namespace):
            return  # it was sent before the bucket counted as away
        bucket.misses += 1
        if bucket.misses < MISSES:
            return
        rest = min(LONGEST_REST, FIRST_REST * 2 ** min(bucket.misses - MISSES, 10))
        bucket.rest_until = asyncio.get_running_loop().time() + rest
        message = "%s does not answer: what can wait is sent in %.1f s: %s"
        log_event(logging.WARNING, message, namespace, rest, error, rule="P9")

    def reset(self) -> None:
        """Ask all buckets again at once."""
        self._buckets.clear()


async def retry(
    circuit: Circuit,
    lease: Lease,
    key: ObjectKey,
    request: Callable[[], Awaitable[R]],
    *,
    lost: bool = False,
) -> tuple[R, bool]:
    """Send a request until it is answered, a few times.

    Args:
        circuit: knows whether the bucket is away.
        lease: the right to send it.
        key: of the object that it is about.
        request: sends it.
        lost: whether the answer to an earlier attempt was lost.

    Returns:
        its result, and whether the answer to an attempt was lost. What it raises says so, too.
    """
    namespace = key.namespace

    async def send() -> R:
        nonlocal lost
        lease.check()
        try:
            circuit.check(namespace)
            result = await request()
        except BaseConnectorException as error:
            lost = error.ambiguous = lost or error.ambiguous
            circuit.note(namespace, error)
            raise
        circuit.note(namespace)
        return result

    result = await repeat(
        send,
        on=lambda error: may_pass(error) and not circuit.is_open(namespace),
        attempts=ATTEMPTS,
        what=f"A request for {namespace}/{key.key}",
        wait_max=2.0,
        transaction=lease.token.transaction_id,
    )
    return result, lost


def may_pass(error: Exception) -> bool:
    """Return whether an idempotent request may succeed when it is sent again."""
    contended = isinstance(error, PreconditionFailedException) and error.contended
    return contended or isinstance(error, ConnectorUnavailableException)
