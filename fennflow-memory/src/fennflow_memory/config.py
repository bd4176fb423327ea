"""The configuration of the memory connector and the memory backend."""

from __future__ import annotations

from fennflow.config import BackendConfig, ConnectorConfig


class InMemoryConnectorConfig(ConnectorConfig):
    """Objects in the memory of the process; they are lost when it ends.

    All units of work in the process that name the same store share it, on every event loop.

    Args:
        name: the name of the store.
        capabilities: what the store enforces; all conditions and no versions by default. It ignores
            conditions that are not named, like weak stores.

    Example:
        ```python
        from fennflow.connectors import InMemoryConnectorConfig

        print(InMemoryConnectorConfig(name="scratch").name)
        #> scratch
        ```
    """

    name: str = "default"


class InMemoryBackendConfig(BackendConfig):
    """Catalog and journal in the memory of the process; they are lost when it ends.

    All units of work in the process with equal backend and connector configs share them, on every
    event loop.

    Args:
        name: distinguishes catalogs that use one store.
    """

    name: str = "default"
