"""What the parts of an engine share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fennflow.backends import ObjectKey

if TYPE_CHECKING:
    from fennflow.backends import Backend
    from fennflow.config import ConfigDict
    from fennflow.connectors import Connector
    from fennflow.engine.leases import Leases


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What everything that an engine does works with.

    Args:
        config: the user's configuration.
        connector: where the objects lie.
        backend: where they are recorded, and transactions are journaled.
        leases: held by this process.
    """

    config: ConfigDict
    connector: Connector
    backend: Backend
    leases: Leases


@dataclass(slots=True)
class Progress:
    """What attempts to finish a transaction have left for the next one to know.

    Args:
        keys_in_flight: the keys which copies and deletions may still reach; they stay locked for a while
            when they are released (P20 b, c).
        uploads: of copies in parts that were begun, by the sequence of the write. Each is aborted
            before another is begun, so none is left (P13).
        failures: how often steps of a key have failed; others come first.
    """

    keys_in_flight: set[ObjectKey] = field(default_factory=set[ObjectKey])
    uploads: dict[int, str] = field(default_factory=dict[int, str])
    failures: Counter[ObjectKey] = field(default_factory=Counter[ObjectKey])
