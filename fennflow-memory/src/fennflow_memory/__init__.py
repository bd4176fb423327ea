"""Connector and backend in the memory of the process."""

from fennflow_memory.config import InMemoryBackendConfig, InMemoryConnectorConfig

__all__ = ["InMemoryBackendConfig", "InMemoryConnectorConfig"]
