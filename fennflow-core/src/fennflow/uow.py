"""`UnitOfWork`: the class that users subclass and open."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, overload

from typing_extensions import override

from fennflow import plugins
from fennflow.config import ConfigDict
from fennflow.engine.callbacks import Callback, Hook, Undo
from fennflow.engine.runtime import engine_for
from fennflow.exceptions import ConfigException, TransactionException
from fennflow.jobs import JobCall, Registering
from fennflow.maintenance import Maintenance
from fennflow.paths import MAX_KEY_BYTES
from fennflow.printable import brief
from fennflow.repositories.fields import (
    areas_of,
    check_fields,
    fields_of,
    namespaces_of,
    without_attribute,
)

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from fennflow.engine.session import Session
    from fennflow.reports import Change
    from fennflow.sync import AnyUnitOfWork

__all__ = ["UnitOfWork"]

T = TypeVar("T")


class _DefaultConfig:
    """Default configuration (in-memory), built lazily.

    Constructing a `ConfigDict` imports all plugins, and these import this module.
    """

    def __init__(self) -> None:
        self._config: ConfigDict | None = None

    def __get__(self, instance: object, owner: type) -> ConfigDict:
        if self._config is None:
            self._config = ConfigDict()
        return self._config


class UnitOfWork(Maintenance, Registering):
    """Repositories whose changes commit together, or not at all.

    Subclass it, declare repository fields and a `config`, and open it with `async with`. The
    block commits at its end; an exception that leaves it undoes all that it did, and propagates.

    Args:
        auto_commit: whether the end of the block commits. If not, it undoes everything after the
            last `commit()`.
        join: an `AsyncSession` or `AsyncConnection` of SQLAlchemy (for `sync()` a `Session` or
            `Connection`) on the database of a `SqlalchemyBackendConfig`: files and rows commit in
            its transaction, in one instant or not at all. If that transaction has begun (`async
            with session.begin()`), its own block ends it; if not, it is committed or rolled back
            with the unit of work.
        timeout: seconds that the unit of work may take, from its opening to its commit; by default
            the `timeout` of the config. After that the current or the next call raises, and so does
            the commit.

    Raises:
        ConfigException: the backend cannot commit in `join`, or the timeout is not a positive
            number.
        TransactionTimeoutException: it took longer than its timeout; nothing of it is committed.
        PluginException: the connector or the backend of `config` is not installed or broken.
        CommitUncertainException: the connection to the backend was lost during the commit (protocol
            P5).

    Example:
        ```python
        import asyncio

        from fennflow import UnitOfWork
        from fennflow.files import TextContent
        from fennflow.repositories import CrudRepository, RepoField


        class UOW(UnitOfWork):
            notes = RepoField(CrudRepository, namespace="notes")


        async def main():
            async with UOW() as uow:
                await uow.notes.put(TextContent.from_content("Hi", filename="hi.txt"))
            async with UOW() as uow:
                print((await uow.notes.get("hi.txt")).one().content)
                #> Hi


        asyncio.run(main())
        ```
    """

    config: ClassVar[ConfigDict] = cast("ConfigDict", _DefaultConfig())
    _synchronous: ClassVar[type[AnyUnitOfWork]]

    @override
    def __init_subclass__(cls, **kwargs: object) -> None:
        """Reject an unusable class when it is defined."""
        super().__init_subclass__(**kwargs)
        check_fields(cls)
        for name in fields_of(cls):
            if hasattr(UnitOfWork, name):
                message = (
                    f"{cls.__name__}.{name} shadows UnitOfWork.{name}; rename the repository field."
                )
                raise ConfigException(message)
        config: object = getattr_static(cls, "config")
        if not isinstance(config, (ConfigDict, _DefaultConfig)):
            message = (
                f"{cls.__name__}.config is a {type(config).__name__}; "
                "use fennflow.ConfigDict(connector=..., backend=...)."
            )
            raise ConfigException(message)
        if isinstance(config, ConfigDict):
            for name, field in fields_of(cls).items():
                if field.prefix.startswith(config.reserved_prefix):
                    message = (
                        f"{cls.__name__}.{name} has the prefix {field.prefix!a}, which begins with "
                        f"FennFlow's own, {config.reserved_prefix!a}. Choose another one."
                    )
                    raise ConfigException(message)

    def __init__(
        self,
        *,
        auto_commit: bool = True,
        join: object | None = None,
        timeout: float | None = None,
    ) -> None:
        given = cast("object", timeout)
        if given is not None and not (isinstance(given, (int, float)) and given > 0):
            message = f"timeout={brief(given)} is not a number of seconds above 0."
            raise ConfigException(message)
        if not isinstance(cast("object", auto_commit), bool):
            message = f"auto_commit={brief(auto_commit)} is neither True nor False."
            raise ConfigException(message)
        self._timeout = timeout
        self._auto_commit = auto_commit
        self._join = join
        self._plugins = plugins.registry()
        self._plugins.connector_for(self.config.connector)
        self._plugins.backend_for(self.config.backend)
        self._session: Session | None = None
        self._use = AsyncExitStack()

    if not TYPE_CHECKING:  # checkers refuse these by themselves

        def __getattr__(self, name: str) -> object:
            raise without_attribute(self, name)

        def __enter__(self) -> None:
            name = type(self).__name__
            message = f"{name}() is used with `async with`. In code without async: with {name}.sync() as uow."
            raise ConfigException(message)

        def __exit__(self, *_: object) -> None: ...

    async def __aenter__(self) -> Self:
        """Open a session; nothing is sent before the first call."""
        if self._session is not None:
            message = "This unit of work is already open or was used before. Construct a new one."
            raise TransactionException(message)
        # Declaring a unit of work imports no more of the engine than it needs.
        from fennflow.engine.reconcile import UsedAreas
        from fennflow.engine.session import Deadline, Session

        deadline = Deadline(self._timeout or self.config.timeout)
        async with deadline.limit(), AsyncExitStack() as stack:
            engine = await stack.enter_async_context(engine_for(self.config, self._plugins))
            areas, joined = UsedAreas(engine.reconciler, areas_of(type(self))), None
            if self._join is not None:
                # Fill the catalog now: it could not be filled while the user's transaction writes
                # to it.
                await areas.prepare_all()
                joined = await engine.backend.join(self._join)
            session = Session(engine, areas, joined, deadline)
            if not self._auto_commit:
                try:
                    session.check_ends_here()
                except BaseException:
                    session.close()
                    raise
            self._use = stack.pop_all()
        self._session = session
        for name, field in fields_of(type(self)).items():
            # RepoField is not a data descriptor, so the instance's attribute is found first.
            self.__dict__[name] = field.bind(self._session)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit, or undo what was done since the last `commit()`."""
        session = self._opened()
        session.check_usable()
        try:
            if exc is not None or not self._auto_commit:
                await session.rollback(exc, last=True)
                return
            try:
                await session.commit(last=True)
            except BaseException as error:
                await session.rollback(error, last=True)
                raise
        finally:
            session.close()
            await self._use.aclose()

    @classmethod
    def sync(
        cls,
        *,
        auto_commit: bool = True,
        join: object | None = None,
        timeout: float | None = None,
    ) -> AnyUnitOfWork:
        """Return a unit of work for code without `async`: `with UOW.sync() as uow`.

        It has the same repositories and methods, which wait for their results. They run on an event
        loop in a thread of FennFlow's; there is one per process.

        Args:
            auto_commit: like that of the class.
            join: like that of the class; a `Session` or `Connection` of SQLAlchemy, too.
            timeout: like that of the class.

        Raises:
            ConfigException: like those of the class.

        Example:
            ```python
            from fennflow import UnitOfWork
            from fennflow.files import TextContent
            from fennflow.repositories import CrudRepository, RepoField


            class UOW(UnitOfWork):
                notes = RepoField(CrudRepository, namespace="notes")


            with UOW.sync() as uow:
                uow.notes.put(TextContent.from_content("Hi", filename="hi.txt"))
            with UOW.sync() as uow:
                print(uow.notes.get("hi.txt").one().content)
                #> Hi
            ```
        """
        from fennflow.sync import sync_of

        if "_synchronous" not in vars(cls):
            cls._synchronous = sync_of(cls)
        return cls._synchronous(auto_commit=auto_commit, join=join, timeout=timeout)

    async def commit(self) -> None:
        """Commit what was done so far; more work may follow, in a transaction of its own.

        Raises:
            ConflictException: `validate_reads`, and a record that was read has changed.
            CommitUncertainException: the outcome is unknown; recovery will commit or roll back.
            TransactionException: the block has ended; or a joined transaction surrounds it, and
                decides itself.
        """
        self._opened().check_ends_here()
        await self._opened().commit()

    async def rollback(self) -> None:
        """Undo what was done since the last `commit()`; more work may follow.

        A joined transaction that does not surround this block is rolled back, too.

        Raises:
            TransactionException: the block has ended; or a joined transaction surrounds it, and
                decides itself.
        """
        self._opened().check_ends_here()
        await self._opened().rollback()

    def on_commit(self, callback: Callback | JobCall, *, key: str | None = None) -> None:
        """Register a function to call after the open transaction has committed.

        Args:
            callback: a function without arguments, plain or async. It is called once. If it raises,
                the exception is logged and the commit stands. It continues in the background if the
                block is cancelled in the meantime. It may also be a call of a function that was
                registered with `UOW.after_commit`: the commit journals it, and it is called at
                least once, if necessary later and by another process. The block waits up to 2
                seconds for it.
            key: registered functions with the same key are called one after the other, in the order
                of their commits. It is text of at most 1,024 bytes.

        Raises:
            ConfigException: the backend cannot journal the call or the key; or a key is given for a
                function that is not registered; or the callback is not a function.
        """
        if isinstance(callback, JobCall):
            _check_order_key(key)
            self._opened().add_hook(Hook(callback, key))
            return
        if key is not None:
            message = (
                "key= orders the calls of functions that are registered with UOW.after_commit."
            )
            raise ConfigException(message)
        _check_callable(callback)
        for each in self._opened().register():
            each.on_commit.append(callback)

    def on_rollback(self, callback: Callback) -> None:
        """Register a function to call after the open transaction was undone, as with `on_commit`."""
        _check_callable(callback)
        for each in self._opened().register():
            each.on_rollback.append(callback)

    @overload
    async def step(self, do: Callable[[], Awaitable[T]], undo: Undo | JobCall) -> T: ...
    @overload
    async def step(self, do: Callable[[], T], undo: Undo | JobCall) -> T: ...
    async def step(self, do: Callable[[], Any], undo: Undo | JobCall) -> Any:
        """Perform a saga step of your own, which is undone if the transaction fails.

        Args:
            do: called now, and awaited unless it is a plain function. If it raises, the step counts
                as not done; if it is cancelled, as done. (With a registered undo: see below.)
            undo: a function that is called if the transaction is undone, up to three times; the
                undo of the last step is called first. If it keeps failing, a note on the exception
                that ended the block says so. If `compensation_timeout` cuts it off, it is called
                again in the background. It may also be a call of a function that was registered
                with `UOW.compensation`: it is journaled before `do` is called, and survives a
                crash. It is also called if `do` raises, since an exception does not prove that the
                step was not done; `StepNotDoneException` does.

        Returns:
            what `do` returned.

        Raises:
            ConfigException: the backend cannot journal the undo, or `do` or `undo` is not a
                function; `do` was not called.
            TransactionLostException: the lease ran out meanwhile; the undo is called.

        Example:
            ```python
            import asyncio

            from fennflow import UnitOfWork

            sent = []


            async def send():
                sent.append("invoice")


            async def recall():
                sent.remove("invoice")


            async def main():
                try:
                    async with UnitOfWork() as uow:
                        await uow.step(send, recall)
                        raise ValueError("no paper")
                except ValueError:
                    print(sent)
                    #> []


            asyncio.run(main())
            ```
        """
        _check_callable(do)
        if not isinstance(undo, JobCall):
            _check_callable(undo)
        return await self._opened().step(do, undo)

    def changes(self) -> Sequence[Change]:
        """Return what the open transaction would create, overwrite and delete.

        Example:
            ```python
            import asyncio

            from fennflow import UnitOfWork
            from fennflow.files import TextContent
            from fennflow.repositories import CrudRepository, RepoField


            class UOW(UnitOfWork):
                notes = RepoField(CrudRepository, namespace="notes")


            async def main():
                async with UOW() as uow:
                    await uow.notes.put(TextContent.from_content("Hi", filename="hi.txt"))
                    for change in uow.changes():
                        print(change.kind, change.path, change.size)
                        #> create hi.txt 2


            asyncio.run(main())
            ```
        """
        return self._opened().changes()

    async def hold(self, *, expires_in: float | None = None) -> str:
        """Leave the changes so far for any process to commit or undo later.

        `UOW.commit_held(id)` or `UOW.abort_held(id)` decides, as does `fennflow transactions
        commit` or `abort`. Until then the paths stay locked, and no reader sees the changes. More
        work may follow in the block, in a transaction of its own.

        Args:
            expires_in: seconds after which recovery undoes it; by default when it is
                `max_transaction_age` old and can no longer commit.

        Returns:
            the id of the transaction.

        Raises:
            TransactionException: nothing was changed; the unit of work joined a transaction; it has
                undos or callbacks that are not registered by name, which no other process could
                call; or its store is a file system.
            ConfigException: it would be held for longer than `max_transaction_age`, or the backend
                cannot hold transactions.
        """
        given = cast("object", expires_in)
        if given is not None and not (isinstance(given, (int, float)) and given > 0):
            message = f"expires_in={brief(given)} is not a number of seconds above 0."
            raise ConfigException(message)
        return await self._opened().hold(expires_in)

    def savepoint(self) -> AbstractAsyncContextManager[None]:
        """Return a block that undoes only its own changes if an exception leaves it; blocks nest.

        Its files, steps and callbacks are undone, an earlier write of this unit of work to the same
        path counts again, and the exception propagates to where you catch it. Work of tasks that
        were started in the block is undone with it. Work of other tasks in the same unit of work
        is not.

        Example:
            ```python
            import asyncio

            from fennflow import UnitOfWork
            from fennflow.files import TextContent
            from fennflow.repositories import CrudRepository, RepoField


            class UOW(UnitOfWork):
                drafts = RepoField(CrudRepository, namespace="drafts")


            async def main():
                async with UOW() as uow:
                    await uow.drafts.put(TextContent.from_content("first", filename="a.txt"))
                    try:
                        async with uow.savepoint():
                            await uow.drafts.put(TextContent.from_content("2nd", filename="a.txt"))
                            raise ValueError
                    except ValueError:
                        print((await uow.drafts.get("a.txt")).one().content)
                        #> first


            asyncio.run(main())
            ```
        """
        return self._opened().savepoint()

    @classmethod
    @asynccontextmanager
    async def lifespan(cls, *, check: bool = True) -> AsyncGenerator[None]:
        """Open the engine now, and close it at the end of the block instead of the loop's end.

        Units of work inside do not have to connect, nor to reconcile buckets before their first use
        if `ReconcileConfig.frequency` is `on_start_app`. Equal configurations share an engine. The
        last of their lifespans closes it, once the units of work that use it have ended.

        If the catalog has no record of a bucket, or the first reading of it was interrupted, all
        its objects are recorded here, before the block begins.

        Args:
            check: list each bucket first, so that a program whose store or bucket is missing does
                not start. If not, the first use raises the error.

        Raises:
            NoSuchNamespaceException: `check`, and a bucket does not exist.
            BaseConnectorException: `check`, and the store cannot be reached, or does not let these
                credentials list the bucket; or the first reading of a bucket has begun, and failed.
            BaseBackendException: the backend cannot be reached.
            ReconcileFailedException: the first reading of a bucket was interrupted, and `frequency`
                is `never`.
        """
        from fennflow.engine.diagnosis import reach
        from fennflow.engine.reconcile import UsedAreas

        async with engine_for(cls.config, plugins.registry(), lifespan=True) as engine:
            if check:
                await reach(engine, namespaces_of(cls))
            await UsedAreas(engine.reconciler, areas_of(cls)).prepare_all()
            yield

    def _opened(self) -> Session:
        if self._session is None:
            message = f"Open it first: async with {type(self).__name__}() as uow."
            raise TransactionException(message)
        return self._session


def _check_callable(function: object) -> None:
    """Refuse an object that cannot be called, before it would be lost after the commit."""
    if not callable(function):
        message = (
            f"{brief(function)} is not a function that can be called later. Pass the function itself, or "
            "lambda: send(order), not the result of a call."
        )
        raise ConfigException(message)


def _check_order_key(key: object) -> None:
    """Refuse a key that not every backend can store, before a commit fails because of it."""
    if key is None:
        return
    try:
        size = len(key.encode()) if isinstance(key, str) and "\0" not in key else MAX_KEY_BYTES + 1
    except UnicodeEncodeError:  # a lone surrogate
        size = MAX_KEY_BYTES + 1
    if size > MAX_KEY_BYTES:
        message = (
            f"key={brief(key)} cannot order calls: it is text of at most {MAX_KEY_BYTES} bytes in "
            "UTF-8, without NUL and lone surrogates."
        )
        raise ConfigException(message)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        from fennflow._migration import missing

        raise missing(__name__, name)
