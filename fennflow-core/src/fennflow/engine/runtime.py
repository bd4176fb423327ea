"""Engines: a connector and a backend in use, one for each configuration and event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from fennflow.engine.circuit import Circuit
from fennflow.engine.concurrency import shielded
from fennflow.engine.context import EngineContext
from fennflow.engine.leases import Leases

if TYPE_CHECKING:
    from fennflow.config import ConfigDict
    from fennflow.engine.reconcile import Reconciler
    from fennflow.engine.recovery import Recovery
    from fennflow.plugins import PluginRegistry


@dataclass(frozen=True, slots=True)
class Engine(EngineContext):
    """The state that transactions of one configuration share on one event loop.

    Args:
        plugins: that are installed.
        recovery: finishes transactions that are left.
        reconciler: compares and corrects catalog and buckets.
    """

    plugins: PluginRegistry
    recovery: Recovery
    reconciler: Reconciler


@dataclass(slots=True)
class _Slot:
    """The slot for one engine on one loop.

    Attributes:
        turn: held while the engine opens or closes.
        engine: the engine, while it is open.
        lifetime: opens it, and closes it at its end.
        users: the number of units of work and other users of the engine.
        lifespans: the number of users that keep it open.
        due: whether the last lifespan has ended, so that the last user has to close the engine.
    """

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    engine: Engine | None = None
    lifetime: AsyncGenerator[Engine] | None = None
    users: int = 0
    lifespans: int = 0
    due: bool = False


_Key = tuple["ConfigDict", int]
_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, _Slot]] = WeakKeyDictionary()
_slots_lock = threading.Lock()


def forget(loop: asyncio.AbstractEventLoop) -> object:
    """Return the engines of a loop that a forked child cannot use, as it has none of its threads."""
    global _slots_lock  # noqa: PLW0603 - another thread may have held it
    _slots_lock = threading.Lock()
    return _slots.pop(loop, None)


@asynccontextmanager
async def engine_for(
    config: ConfigDict, plugins: PluginRegistry, *, lifespan: bool = False
) -> AsyncGenerator[Engine]:
    """Use the engine of a configuration on the running loop, opening it at first use.

    It is closed after the last lifespan, when it is no longer used; a caller that needs it
    meanwhile waits, and opens another one. Without a lifespan it is closed with the loop: it lives
    in an asynchronous generator, and `asyncio.run`, like every runner that shuts a loop down
    properly, closes open generators.

    Args:
        config: the configuration.
        plugins: that are installed.
        lifespan: whether the block keeps it open for others.

    Raises:
        PluginException: no plugin provides the connector or the backend.
        FennFlowException: the connector or the backend cannot be opened.
    """
    loop = asyncio.get_running_loop()
    with _slots_lock:
        for other in [other for other in _slots if other.is_closed()]:
            del _slots[other]
        slot = _slots.setdefault(loop, {}).setdefault((config, id(plugins)), _Slot())
    async with slot.turn:
        if slot.engine is None:
            # Use an empty context: connections and their tasks outlive the request that opens them.
            await loop.create_task(_open(slot, config, plugins), context=Context())
        engine = slot.engine
        assert engine is not None  # noqa: S101 - it was opened, or that has raised
        slot.users += 1
        slot.lifespans += lifespan
        slot.due = slot.due and not lifespan
    try:
        yield engine
    finally:
        slot.users -= 1
        slot.lifespans -= lifespan
        slot.due = (slot.due or lifespan) and not slot.lifespans
        if slot.due and not slot.users:
            work, cancellation = await shielded(
                _close(slot), grace=lambda: config.compensation_timeout
            )
            if cancellation is not None:
                raise cancellation
            work.result()


async def _close(slot: _Slot) -> None:
    async with slot.turn:
        # Meanwhile another task may have used it again, or closed it.
        if slot.due and not slot.users and slot.lifetime is not None:
            await slot.lifetime.aclose()


async def _open(slot: _Slot, config: ConfigDict, plugins: PluginRegistry) -> None:
    """Open an engine; if the caller is cancelled after that, the next caller finds it open."""
    slot.lifetime = _lifetime(config, plugins, slot)
    slot.engine = await anext(slot.lifetime)


async def _lifetime(
    config: ConfigDict, plugins: PluginRegistry, slot: _Slot
) -> AsyncGenerator[Engine]:
    # A program that only declares a unit of work imports this module, and may never open an engine.
    from fennflow.engine.catalogs import Registry
    from fennflow.engine.reconcile import Reconciler
    from fennflow.engine.recovery import Recovery

    try:
        async with AsyncExitStack() as stack:
            new_connector = plugins.connector_for(config.connector).factory
            new_backend = plugins.backend_for(config.backend).factory
            # Use threads, since a factory may import a driver, which takes almost a second.
            connector = await asyncio.to_thread(new_connector, config.connector, config)
            connector.buffers.limit = config.max_buffered_bytes
            stack.push_async_callback(connector.aclose)
            await connector.open()
            backend = await asyncio.to_thread(new_backend, config.backend, config)
            stack.push_async_callback(backend.aclose)
            await backend.open()
            connector.remember_in(backend)
            leases = Leases(backend, config.lease_ttl, config.late_write_period)
            stack.push_async_callback(leases.aclose)
            context = EngineContext(config, connector, backend, leases, Circuit())
            recovery = Recovery(context)
            stack.push_async_callback(recovery.aclose)
            recovery.start()
            reconciler = Reconciler(context, recovery, Registry(context))
            yield Engine(
                config, connector, backend, leases, context.circuit, plugins, recovery, reconciler
            )
    finally:
        slot.engine = slot.lifetime = None
        slot.due = False
