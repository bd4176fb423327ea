"""Transactions over object storage, the Pydantic way."""

import sys
from typing import TYPE_CHECKING

from fennflow._migration import FormerModules, missing
from fennflow.config import ConfigDict, ReconcileConfig
from fennflow.uow import UnitOfWork

__all__ = ["ConfigDict", "ReconcileConfig", "UnitOfWork"]

sys.meta_path.append(FormerModules())

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        raise missing(__name__, name)
