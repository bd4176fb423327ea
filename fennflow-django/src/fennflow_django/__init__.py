"""Files that follow `transaction.atomic()`: a storage for Django on FennFlow."""

from fennflow_django.database import backend_config
from fennflow_django.storage import FennFlowStorage
from fennflow_django.transactions import unit_of_work

__all__ = ["FennFlowStorage", "backend_config", "unit_of_work"]
