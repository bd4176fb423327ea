"""Lets tests that are written with `async` try what is used without it: each call in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import Transaction
from sqlalchemy.orm import Session, SessionTransaction

from fennflow import UnitOfWork
from fennflow.sync import SyncRepository, SyncUnitOfWork

WRAPPED = (
    Connection,
    Engine,
    Session,
    SessionTransaction,
    Transaction,
    SyncRepository,
    SyncUnitOfWork,
)
PLAIN = {"add", "in_transaction", "on_commit", "on_rollback"}
"""Methods that are not awaited with `async` either."""
_pool = ThreadPoolExecutor(16, "caller")


def wrapped(given: Any, context: Context) -> Any:
    return Threaded(given, context) if isinstance(given, WRAPPED) else given


def bare(given: Any) -> Any:
    return given.target if isinstance(given, Threaded) else given


class Pending:
    """A call that is awaited, or a block that is entered, in a thread."""

    def __init__(self, function: Callable[[], Any], context: Context) -> None:
        self._function = function
        self._context = context
        self._block: Any = None

    async def _run(self, function: Callable[..., Any], *arguments: object) -> Any:
        run = asyncio.get_running_loop().run_in_executor
        return await run(_pool, lambda: self._context.run(function, *arguments))

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._result().__await__()

    async def _result(self) -> Any:
        return wrapped(await self._run(self._function), self._context)

    async def __aenter__(self) -> Any:
        self._block = await self._run(self._function)
        return wrapped(await self._run(self._block.__enter__), self._context)

    async def __aexit__(self, *error: object) -> bool | None:
        left: bool | None = await self._run(self._block.__exit__, *error)
        return left


class Threaded:
    """What is used without `async`, as if it were used with it."""

    def __init__(self, target: Any, context: Context | None = None) -> None:
        self.target = target
        self._context = context or copy_context()
        self._entered: Pending | None = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.target, name)
        if not callable(found) or isinstance(found, type):
            return wrapped(found, self._context)

        def call(*args: Any, **kwargs: Any) -> Any:
            function = lambda: found(*map(bare, args), **kwargs)  # noqa: E731 - called elsewhere
            if name in PLAIN:
                return _pool.submit(self._context.run, function).result()
            return Pending(function, self._context)

        return call

    async def __aenter__(self) -> Any:
        self._entered = Pending(lambda: self.target, self._context)
        return await self._entered.__aenter__()

    async def __aexit__(self, *error: object) -> bool | None:
        assert self._entered is not None
        return await self._entered.__aexit__(*error)


class ThreadedUnits:
    """A class of units of work: those that join something are used without `async`."""

    def __init__(self, uow_class: type[UnitOfWork]) -> None:
        self._uow_class = uow_class

    def __getattr__(self, name: str) -> Any:
        return getattr(self._uow_class, name)

    def __call__(self, **options: Any) -> Any:
        if "join" not in options:
            return self._uow_class(**options)
        join = bare(options.pop("join"))
        return Pending(lambda: self._uow_class.sync(join=join, **options), copy_context())
