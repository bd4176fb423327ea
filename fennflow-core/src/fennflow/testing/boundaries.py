"""Boundaries: the moments around each request and commit at which tests kill a process."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from fennflow.connectors import Connector

REQUESTS = (
    "probe",
    "put",
    "upload",
    "get",
    "stream",
    "head",
    "copy",
    "delete",
    "list",
    "versions",
    "uploads",
)
COMMITS = ("sqlalchemy.engine.default", "DefaultDialect", "do_commit")


class Boundary(NamedTuple):
    """A moment at which the process may be killed.

    Args:
        when: before a request or a commit is sent, or after it was answered.
        what: the method of the connector, or `commit` of the database.
    """

    when: Literal["before", "after"]
    what: str


@contextmanager
def boundaries(reached: Callable[[Boundary], None]) -> Generator[None]:
    """Call back before and after each object request and each commit of SQLAlchemy.

    It applies to connectors whose classes are imported in this process while the block runs.

    Args:
        reached: called at each boundary; may kill the process, or raise.

    Example:
        ```python
        from fennflow.testing import boundaries, killing

        with boundaries(killing(at=10_000)):  # run a unit of work here
            pass
        ```
    """
    patched: list[tuple[type, str, Any]] = []
    for cls in _subclasses(Connector):
        for name in REQUESTS:
            if name in vars(cls):
                patched.append((cls, name, vars(cls)[name]))
                setattr(cls, name, _wrapped(vars(cls)[name], name, reached))
    module, cls_name, name = COMMITS
    if module in sys.modules:
        dialect: type = getattr(sys.modules[module], cls_name)
        patched.append((dialect, name, vars(dialect)[name]))
        setattr(dialect, name, _wrapped(vars(dialect)[name], "commit", reached))
    try:
        yield
    finally:
        for cls, name, original in patched:
            setattr(cls, name, original)


def killing(*, at: int) -> Callable[[Boundary], None]:
    """Return a function that kills this process with SIGKILL at a boundary.

    Args:
        at: the number of the boundary, counted from 0.
    """
    left = at

    def reached(_: Boundary) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    return reached


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def _wrapped(function: Any, name: str, reached: Callable[[Boundary], None]) -> Any:
    before, after = Boundary("before", name), Boundary("after", name)
    if inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def iterate(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            reached(before)
            async for each in function(*args, **kwargs):
                yield each
            reached(after)

        return iterate
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def request(*args: Any, **kwargs: Any) -> Any:
            reached(before)
            answer = await function(*args, **kwargs)
            reached(after)
            return answer

        return request

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        reached(before)
        answer = function(*args, **kwargs)
        reached(after)
        return answer

    return call
