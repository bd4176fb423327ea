"""Calls user functions in threads, and contains whatever they raise."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from fennflow.exceptions import TransactionException

T = TypeVar("T")


def contained(function: Callable[[], T]) -> T:
    """Call a user function in a thread that an event loop waits for.

    A BaseException that is not an Exception would end that loop, and no future accepts a
    StopIteration: the caller would wait forever.

    Raises:
        TransactionException: the function raised one of these.
        Exception: what it raised.
    """
    try:
        return function()
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        raise uncommon(error) from error


def may_be_from_signal(error: BaseException) -> bool:
    """Return whether a signal handler may have raised an exception; they run in the main thread only."""
    main = threading.current_thread() is threading.main_thread()
    return main and isinstance(error, (KeyboardInterrupt, SystemExit))


def uncommon(error: BaseException) -> TransactionException:
    """Return what to raise instead of an exception that would end more than the call."""
    return TransactionException(f"It ended with {error!r}, which does not say what failed.")
