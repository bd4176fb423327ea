"""Threads that also work at the end of the program."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from typing_extensions import override

from fennflow.exceptions import TransactionException


class Threads(ThreadPoolExecutor):
    """Does the work in the threads that there are where no other can be started.

    Python 3.12 starts none once the main thread has ended, when threads that are left may still work,
    and `UOW.sync()` closes what it has opened.
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
