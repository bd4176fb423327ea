"""Files of SQLite's are closed while the process is forked.

SQLite notes in memory which locks its process has on a file that is open. A child that has the note has
none of the locks: another process could take the file for unused, and delete the write-ahead log into
which the child writes. What the child commits then would be lost without an error.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from threading import Condition, local
from weakref import WeakSet

from sqlalchemy import Engine

PATIENCE = 5.0
"""Seconds for which a fork waits for transactions that are under way."""


class _Files:
    """The files of SQLite's that this process has open."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget the parent, whose threads a child does not have."""
        self.engines: WeakSet[Engine] = WeakSet()
        self._changed = Condition()
        self._thread = local()
        self._users = 0
        self._forking = False

    @contextmanager
    def using(self) -> Generator[None]:
        """Keep other threads from forking, and wait while one does."""
        depth: int = getattr(self._thread, "depth", 0)
        if not depth:
            with self._changed:
                self._changed.wait_for(lambda: not self._forking)
                self._users += 1
        self._thread.depth = depth + 1
        try:
            yield
        finally:
            self._thread.depth = depth
            if not depth:
                with self._changed:
                    self._users -= 1
                    self._changed.notify_all()

    def close(self) -> None:
        """Close all before a fork, and open none until it is over."""
        own = 1 if getattr(self._thread, "depth", 0) else 0
        with self._changed:
            self._changed.wait_for(lambda: not self._forking)
            self._forking = True
            self._changed.wait_for(lambda: self._users == own, PATIENCE)
        for engine in list(self.engines):
            engine.dispose()

    def go_on(self) -> None:
        """Let threads of the parent open files again."""
        with self._changed:
            self._forking = False
            self._changed.notify_all()


FILES = _Files()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=FILES.close, after_in_parent=FILES.go_on, after_in_child=FILES.begin)
