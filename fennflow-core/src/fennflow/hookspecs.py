"""The plugin contract, all of it.

A plugin is a module named by an entry point of the group `fennflow`. It implements any of these
hooks with `@hookimpl`, and imports no driver: discovery imports every plugin.

A plugin may say for which major version of this page it was built: `FENNFLOW_HOOKSPEC_VERSION = 1`
in its module. Another number than `HOOKSPEC_VERSION` is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fennflow.backends.contract import Backend
    from fennflow.config import BackendConfig, ConfigDict, ConnectorConfig
    from fennflow.connectors.contract import Connector
    from fennflow.files.content import BaseContent

__all__ = [
    "HOOKSPEC_VERSION",
    "BackendPlugin",
    "ConnectorPlugin",
    "ContentTypePlugin",
    "fennflow_backends",
    "fennflow_connectors",
    "fennflow_content_types",
    "hookimpl",
]

HOOKSPEC_VERSION = 1

hookspec = pluggy.HookspecMarker("fennflow")
hookimpl = pluggy.HookimplMarker("fennflow")


@dataclass(frozen=True, slots=True)
class ConnectorPlugin:
    """A connector: its name, its config class, and its factory.

    Args:
        name: unique, for instance `s3`.
        config: exported as `fennflow.connectors.<its name>`.
        factory: called in a worker thread, so it may import a driver, with the config and the
            whole configuration; does no I/O.
    """

    name: str
    config: type[ConnectorConfig]
    factory: Callable[[Any, ConfigDict], Connector]


@dataclass(frozen=True, slots=True)
class BackendPlugin:
    """A backend: its name, its config class, and its factory; like `ConnectorPlugin`."""

    name: str
    config: type[BackendConfig]
    factory: Callable[[Any, ConfigDict], Backend]


@dataclass(frozen=True, slots=True)
class ContentTypePlugin:
    """A content type.

    Args:
        tag: unique; stored with every object, so that a file is read back as its own class.
        content: exported as `fennflow.files.<its name>`.
        media_types: which objects that FennFlow did not write it reads: `text/csv` or `text/*`.
    """

    tag: str
    content: type[BaseContent]
    media_types: tuple[str, ...] = ()


@hookspec
def fennflow_connectors() -> Iterable[ConnectorPlugin]:  # type: ignore[empty-body]  # a spec has no body
    """Return the connectors that this plugin provides."""


@hookspec
def fennflow_backends() -> Iterable[BackendPlugin]:  # type: ignore[empty-body]  # a spec has no body
    """Return the backends that this plugin provides."""


@hookspec
def fennflow_content_types() -> Iterable[ContentTypePlugin]:  # type: ignore[empty-body]  # a spec has no body
    """Return the content types that this plugin provides."""
