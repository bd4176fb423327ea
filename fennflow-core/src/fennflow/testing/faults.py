"""Injects faults between the engine and its connector and backend.

Both wrap any other connector or backend, and pass every operation to a `Faults`, which decides
whether and when it takes effect, and what it returns. Switch them on with
`plugins.override(faults)`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from typing_extensions import override

from fennflow import ConfigDict, plugins
from fennflow.backends import Backend
from fennflow.config import BackendConfig, ConnectorConfig
from fennflow.connectors import Connector
from fennflow.hookspecs import BackendPlugin, ConnectorPlugin, hookimpl
from fennflow.testing.faulty import (
    Effect as Effect,
)
from fennflow.testing.faulty import (
    Faults as Faults,
)
from fennflow.testing.faulty import (
    FaultyConnector as FaultyConnector,
)
from fennflow.testing.faulty import (
    Operation as Operation,
)
from fennflow.testing.faulty_backend import (
    FaultyBackend as FaultyBackend,
)

__all__ = [
    "Effect",
    "Faults",
    "FaultyBackend",
    "FaultyBackendConfig",
    "FaultyConnector",
    "FaultyConnectorConfig",
    "Operation",
    "Script",
    "Scripted",
]

R = TypeVar("R")

Script = Callable[[str, str, str], Awaitable[None]]
"""Called with `before` or `after`, the operation, and a key (or nothing)."""


@dataclass(frozen=True, slots=True)
class Scripted(Faults):
    """Calls a script before and after every operation; its exceptions are raised there.

    If it raises before, the operation has no effect; if it raises after, the answer is lost.

    Args:
        script: the function to call.

    Example:
        ```python
        import asyncio

        from fennflow import ConfigDict, UnitOfWork, plugins
        from fennflow.connectors import InMemoryConnectorConfig
        from fennflow.exceptions import ConnectorUnavailableException
        from fennflow.files import TextContent
        from fennflow.repositories import CrudRepository, RepoField
        from fennflow.testing import faults


        async def lose_answers(when, operation, key):
            if (when, operation) == ("after", "put"):
                raise ConnectorUnavailableException("The answer got lost.")


        class UOW(UnitOfWork):
            notes = RepoField(CrudRepository, namespace="notes")
            config = ConfigDict(
                connector=faults.FaultyConnectorConfig(
                    inner=InMemoryConnectorConfig(), faults=faults.Scripted(lose_answers)
                )
            )


        async def main():
            with plugins.override(faults):
                async with UOW() as uow:
                    await uow.notes.put(TextContent.from_content("Hi", filename="hi.txt"))
                    print(*await uow.notes.list())
                    #> hi.txt


        asyncio.run(main())
        ```
    """

    script: Script

    @override
    async def around(self, operation: Operation, effect: Effect[R]) -> R:
        key = " ".join(operation.keys)
        await self.script("before", operation.name, key)
        result = await effect()
        await self.script("after", operation.name, key)
        return result


class FaultyConnectorConfig(ConnectorConfig):
    """A connector whose operations go through `Faults`.

    Args:
        inner: the connector that does the work.
        faults: decides about each operation.
    """

    inner: ConnectorConfig
    faults: Faults


class FaultyBackendConfig(BackendConfig):
    """A backend whose operations go through `Faults`; like `FaultyConnectorConfig`."""

    inner: BackendConfig
    faults: Faults


def _new_connector(config: FaultyConnectorConfig, settings: ConfigDict) -> Connector:
    plugin = plugins.registry().connector_for(config.inner)
    inner = plugin.factory(config.inner, settings.model_copy(update={"connector": config.inner}))
    return FaultyConnector(inner, config.faults)


def _new_backend(config: FaultyBackendConfig, settings: ConfigDict) -> Backend:
    plugin = plugins.registry().backend_for(config.inner)
    connector = settings.connector
    if isinstance(connector, FaultyConnectorConfig):
        # A memory backend has one catalog for each store, even if the store is wrapped.
        settings = settings.model_copy(update={"connector": connector.inner})
    return FaultyBackend(plugin.factory(config.inner, settings), config.faults)


@hookimpl
def fennflow_connectors() -> Iterable[ConnectorPlugin]:
    """Return the connector that wraps others."""
    return [ConnectorPlugin("faulty", FaultyConnectorConfig, _new_connector)]


@hookimpl
def fennflow_backends() -> Iterable[BackendPlugin]:
    """Return the backend that wraps others."""
    return [BackendPlugin("faulty", FaultyBackendConfig, _new_backend)]
