"""Threads that still work while the program ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from typing_extensions import override

from fennflow.exceptions import TransactionException


class Threads(ThreadPoolExecutor):
    """Executes work in existing threads if no new thread can be started.

    From Python 3.12 on, no thread can be started once the main thread has ended. But other threads
    may still be working then, and `UOW.sync()` closes its engines.
    """

    @override
    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except RuntimeError as error:
            if not self._threads:
                message = (
                    "This needs a new thread, and Python starts none after the main thread has ended. "
                    "Nothing was done. End your threads before the main thread ends."
                )
                raise TransactionException(message) from error
