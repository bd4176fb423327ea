"""The context that the components of an engine share: configuration, connector, backend and leases."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fennflow.backends import ObjectKey

if TYPE_CHECKING:
    from fennflow.backends import Backend
    from fennflow.config import ConfigDict
    from fennflow.connectors import Connector
    from fennflow.engine.circuit import Circuit
    from fennflow.engine.leases import Leases


@dataclass(frozen=True, slots=True)
class EngineContext:
    """Connector, backend, leases and configuration shared by the engine's components.

    Args:
        config: the user's configuration.
        connector: where the objects are stored.
        backend: where objects are recorded and transactions are journaled.
        leases: the leases that this process holds.
        circuit: tracks buckets that do not respond.
    """

    config: ConfigDict
    connector: Connector
    backend: Backend
    leases: Leases
    circuit: Circuit


@dataclass(slots=True)
class Progress:
    """The progress of earlier attempts to finish a transaction.

    Args:
        keys_in_flight: keys that copies and deletions may still reach; after their release they
            stay locked for a while (P20 b, c).
        uploads: the multipart copies that were begun, by the sequence of the write. Each is aborted
            before another is begun, so none is left (P13).
        failures: how often steps of a key have failed; keys with fewer failures come first.
    """

    keys_in_flight: set[ObjectKey] = field(default_factory=set[ObjectKey])
    uploads: dict[int, str] = field(default_factory=dict[int, str])
    failures: Counter[ObjectKey] = field(default_factory=Counter[ObjectKey])
