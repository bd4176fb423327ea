"""Transactions over object storage, the Pydantic way."""

from fennflow.config import ConfigDict, ReconcileConfig
from fennflow.uow import UnitOfWork

__all__ = ["ConfigDict", "ReconcileConfig", "UnitOfWork"]
