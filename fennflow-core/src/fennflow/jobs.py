"""Functions that are called even if the process dies: compensations of steps, and hooks after commits.

They are registered by name, so that any process that knows the name can call them. Their arguments
are stored as JSON.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    NotRequired,
    ParamSpec,
    cast,
    get_type_hints,
)

from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError
from pydantic import ConfigDict as PydanticConfigDict
from pydantic_core import PydanticSerializationError
from typing_extensions import TypedDict, override

from fennflow.backends import Job, Outcome
from fennflow.containing import contained
from fennflow.exceptions import ConfigException, TransactionException
from fennflow.printable import brief

if TYPE_CHECKING:
    from fennflow.config import ConfigDict

__all__ = ["Job", "JobCall", "JobFunction", "Registering", "current_job"]

P = ParamSpec("P")

TIMEOUT = 60.0
"""Seconds that one call may take, unless the function was registered with another limit."""

_registered: dict[ConfigDict, dict[str, JobFunction[...]]] = {}
_current: ContextVar[Job] = ContextVar("fennflow_job")
_threads: dict[str, Future[object]] = {}
"""Calls of plain functions that may still run in a thread, by idempotency key."""


def current_job() -> Job:
    """Return the job of the running compensation or hook: its `idempotency_key`, its `attempts`.

    Raises:
        TransactionException: it was called outside of a compensation or a hook.
    """
    try:
        return _current.get()
    except LookupError:
        message = "current_job() was called outside of a compensation or a hook."
        raise TransactionException(message) from None


@dataclass(frozen=True, slots=True)
class JobCall:
    """A call of a registered function that has not happened yet.

    Args:
        function: which one.
        arguments: as JSON.
    """

    function: JobFunction[...]
    arguments: str


class JobFunction(Generic[P]):
    """A registered function. Calling it checks the arguments, and returns what to give to a unit of work.

    Args:
        function: plain or async. A plain one is called in a thread.
        name: under which it is journaled.
        after: the outcome of the transaction after which it is called.
        timeout: seconds that one call may take.

    Raises:
        ConfigException: its parameters cannot be stored as JSON, or the name or timeout is unusable.
    """

    def __init__(
        self, function: Callable[P, object], name: str, after: Outcome, timeout: float
    ) -> None:
        if not (name.isprintable() and name.strip() == name != ""):
            message = (
                f"The name {name!a} is not usable: give printable text without spaces around it."
            )
            raise ConfigException(message)
        if not timeout > 0:
            message = f"timeout={timeout!a} is not a number of seconds above 0."
            raise ConfigException(message)
        if not hasattr(function, "__qualname__"):
            message = (
                f"{brief(function)} is not a function. Register one that is defined with def, so that "
                "messages and later versions can name it."
            )
            raise ConfigException(message)
        self.function = function
        self.name = name
        self.after = after
        self.timeout = timeout
        self._signature = inspect.signature(function)
        self._model: type[BaseModel] | None = None
        self._arguments = self._adapter()

    @override
    def __repr__(self) -> str:
        return self.name

    def _adapter(self) -> TypeAdapter[dict[str, Any]]:
        function = f"{self.function.__module__}.{self.function.__qualname__}"
        try:
            hints = get_type_hints(self.function, include_extras=True)
        except Exception as error:
            message = (
                f"The types of {function} cannot be resolved: {error}. Define them, and what they "
                "name, at the top level of its module."
            )
            raise ConfigException(message) from error
        fields: dict[str, Any] = {}
        for parameter in self._signature.parameters.values():
            kinds = {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY}
            if parameter.kind in kinds or parameter.name not in hints:
                message = (
                    f"{function} cannot be registered: its parameter {parameter} has no type, or no "
                    "name by which it is passed. Arguments are stored as JSON, by name."
                )
                raise ConfigException(message)
            hint = hints[parameter.name]
            fields[parameter.name] = (
                hint if parameter.default is parameter.empty else NotRequired[hint]
            )
            if inspect.isclass(hint) and issubclass(hint, BaseModel):
                self._model = hint
        if len(fields) != 1:
            self._model = None
        arguments = cast("Any", TypedDict)("arguments", fields)
        arguments.__pydantic_config__ = PydanticConfigDict(extra="forbid")
        try:
            return TypeAdapter(cast("type[dict[str, Any]]", arguments))
        except PydanticUserError as error:
            message = f"The arguments of {function} cannot be stored as JSON: {error.message}"
            raise ConfigException(message) from error

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> JobCall:
        """Return a call with these arguments, for `uow.step(undo=…)` or `uow.on_commit(…)`.

        If the only parameter is a pydantic model, its fields can be given instead of it.

        Raises:
            ConfigException: the arguments do not fit the function, or change when they are stored
                as JSON.
        """
        given: Mapping[str, Any] = kwargs
        try:
            if (
                self._model is not None
                and not args
                and set(kwargs) != set(self._signature.parameters)
            ):
                given = {next(iter(self._signature.parameters)): self._model(**kwargs)}
            bound = self._signature.bind(*args, **given)
            bound.apply_defaults()
            values = self._arguments.validate_python(bound.arguments)
            text = self._arguments.dump_json(values).decode()
            kept = self._arguments.validate_json(text) == values
        except (TypeError, ValidationError, PydanticSerializationError, UnicodeError) as error:
            message = f"{self.name} cannot be called with these arguments: {_reason(error)}"
            raise ConfigException(message) from None
        if not kept:
            message = (
                f"An argument of {self.name} changes when it is stored as JSON; a secret, for instance, "
                "becomes asterisks. Pass something by which the function can look it up."
            )
            raise ConfigException(message)
        return JobCall(self, text)

    async def call(self, job: Job) -> None:
        """Call the function for a job.

        Raises:
            ConfigException: the stored arguments are not the function's any more; or the job is a
                hook and the function a compensation, or the other way round.
            Exception: what it raises.
        """
        hook = job.after is Outcome.COMMITTED
        if hook is not (self.after is Outcome.COMMITTED):
            message = (
                f"{self.name} was journaled as a {'hook' if hook else 'compensation'}, and this process "
                f"has registered it as a {'compensation' if hook else 'hook'}. It is not called. Give "
                "the other function another name."
            )
            raise ConfigException(message)
        try:
            values = self._arguments.validate_json(job.arguments)
        except ValidationError as error:
            message = (
                f"The stored arguments of {self.name} do not fit its parameters: {_reason(error)}"
            )
            raise ConfigException(message) from None
        _current.set(job)
        call = partial(cast("Callable[..., object]", self.function), **values)
        if inspect.iscoroutinefunction(self.function):
            await cast("Any", call())
            return
        result = await _in_thread(job.idempotency_key, call)
        if inspect.isawaitable(result):
            await result

    def is_registered(self, config: ConfigDict) -> bool:
        """Return whether processes call it for units of work of a configuration."""
        there = functions_of(config).get(self.name)
        return there is not None and _place_of(there.function) == _place_of(self.function)


async def _in_thread(key: str, call: Callable[[], object]) -> object:
    """Call a plain function in a thread of its own.

    A thread cannot be cancelled. So an attempt waits for the thread of an earlier attempt that
    still runs. Neither other threads nor the end of the program wait for a thread that hangs.
    """
    future = _threads.get(key)
    if future is None:
        future = _threads[key] = Future()
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        thread = partial(threading.Thread, name=f"fennflow-{key}", daemon=True)
        thread(target=copy_context().run, args=(_complete, future, call)).start()
    try:
        return await asyncio.wrap_future(future)
    finally:
        if future.done():
            _threads.pop(key, None)


def _complete(future: Future[object], call: Callable[[], object]) -> None:
    try:
        future.set_result(contained(call))
    except Exception as error:  # noqa: BLE001 - raised by the waiting caller
        future.set_exception(error)


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    # The input may be a secret.
    return "; ".join(
        f"{'.'.join(map(str, detail['loc'])) or 'value'}: {detail['msg']}"
        for detail in error.errors(include_input=False, include_context=False, include_url=False)
    )


def functions_of(config: ConfigDict) -> dict[str, JobFunction[...]]:
    """Return the functions that are registered for units of work of a configuration, now and later."""
    return _registered.setdefault(config, {})


def share_functions(config: ConfigDict, other: ConfigDict) -> None:
    """Have units of work of another configuration call the functions of this one, now and later."""
    _registered[other] = functions_of(config)


class Registering:
    """The class methods of a unit of work that register functions."""

    config: ClassVar[ConfigDict]

    @classmethod
    def compensation(
        cls, name: str, *, timeout: float = TIMEOUT
    ) -> Callable[[Callable[P, object]], JobFunction[P]]:
        """Register a function that undoes a step: `await uow.step(charge, undo=refund(payment_id=…))`.

        The call is journaled before the step is done. If the unit of work does not commit, it happens
        at least once, even if the process dies: any process with the name calls it, until it returns.
        It has to accept that the step was not done, and that it is called more than once.

        Args:
            name: under which calls are journaled; the same in every process, and in later versions.
            timeout: seconds that one call may take; then it is cancelled, and called again later.

        Raises:
            ConfigException: another function has the name, or a parameter has no type.
        """
        return partial(_register, cls.config, name, Outcome.ABORTED, timeout)

    @classmethod
    def after_commit(
        cls, name: str, *, timeout: float = TIMEOUT
    ) -> Callable[[Callable[P, object]], JobFunction[P]]:
        """Register a function that is called after a commit: `uow.on_commit(send_receipt(order=7))`.

        The call is journaled by the commit itself. It happens at least once, even if the process
        dies: any process with the name calls it, until it returns. It holds no lock.

        Args:
            name: under which calls are journaled; the same in every process, and in later versions.
            timeout: seconds that one call may take; then it is cancelled, and called again later.

        Raises:
            ConfigException: another function has the name, or a parameter has no type.
        """
        return partial(_register, cls.config, name, Outcome.COMMITTED, timeout)


def _register(
    config: ConfigDict,
    name: str,
    after: Outcome,
    timeout: float,
    function: Callable[P, object],
) -> JobFunction[P]:
    made = JobFunction(function, name, after, timeout)
    there = functions_of(config).get(name)
    if there is not None and _place_of(there.function) != _place_of(function):
        message = (
            f"The name {name!a} is already registered for {_place_of(there.function)}, so it cannot be "
            f"used for {_place_of(function)}. Units of work with equal configurations share names."
        )
        raise ConfigException(message)
    functions_of(config)[name] = made
    return made


def _place_of(function: Callable[..., object]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
