"""Closes SQLite files while the process is forked.

SQLite keeps the locks of its process on an open file in memory. A forked child inherits that memory
but not the locks. Another process could then treat the file as unused, and delete the write-ahead
log to which the child writes. Commits of the child would be lost without an error.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from threading import Condition, local
from weakref import WeakSet

from sqlalchemy import Engine

PATIENCE = 5.0
"""Seconds for which a fork waits for running transactions."""


class _Files:
    """The SQLite files that this process has open."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Reset the state in a child, which does not have the parent's threads."""
        self.engines: WeakSet[Engine] = WeakSet()
        self._changed = Condition()
        self._thread = local()
        self._users = 0
        self._forking = False

    @contextmanager
    def using(self) -> Generator[None]:
        """Keep other threads from forking, and wait while one forks."""
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
        """Close all files before a fork, and open none until it has ended."""
        own = 1 if getattr(self._thread, "depth", 0) else 0
        with self._changed:
            self._changed.wait_for(lambda: not self._forking)
            self._forking = True
            self._changed.wait_for(lambda: self._users == own, PATIENCE)
        for engine in list(self.engines):
            engine.dispose()

    def go_on(self) -> None:
        """Allow threads of the parent to open files again."""
        with self._changed:
            self._forking = False
            self._changed.notify_all()


FILES = _Files()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=FILES.close, after_in_parent=FILES.go_on, after_in_child=FILES.begin)
