"""Transactions over object storage, the Pydantic way."""

import sys

from fennflow._migration import FormerModules
from fennflow.config import ConfigDict, ReconcileConfig
from fennflow.uow import UnitOfWork

__all__ = ["ConfigDict", "ReconcileConfig", "UnitOfWork"]

sys.meta_path.append(FormerModules())
