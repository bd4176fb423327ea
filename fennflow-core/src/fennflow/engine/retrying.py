"""Idempotent requests, sent again while the store is unavailable (P9)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina

from fennflow.engine.leases import Lease
from fennflow.exceptions import (
    BaseConnectorException,
    ConnectorUnavailableException,
    PreconditionFailedException,
)

R = TypeVar("R")


async def retry(
    lease: Lease, request: Callable[[], Awaitable[R]], *, lost: bool = False
) -> tuple[R, bool]:
    """Send a request until it is answered, a few times.

    Args:
        lease: the right to send it.
        request: sends it.
        lost: whether the answer to an earlier attempt was lost.

    Returns:
        its result, and whether the answer to an attempt was lost. What it raises says so, too.
    """
    async for attempt in stamina.retry_context(
        on=may_pass, attempts=4, wait_initial=0.1, wait_max=2.0
    ):
        with attempt:
            lease.check()
            try:
                return await request(), lost
            except BaseConnectorException as error:
                lost = error.ambiguous = lost or error.ambiguous
                raise
    message = "unreachable: retry_context raises when it gives up"
    raise AssertionError(message)


def may_pass(error: Exception) -> bool:
    """Return whether an idempotent request may succeed when it is sent again."""
    contended = isinstance(error, PreconditionFailedException) and error.contended
    return contended or isinstance(error, ConnectorUnavailableException)
