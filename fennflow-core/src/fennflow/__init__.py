"""Transactions over object storage, the Pydantic way."""

from fennflow.config import ConfigDict
from fennflow.uow import UnitOfWork

__all__ = ["ConfigDict", "UnitOfWork"]
