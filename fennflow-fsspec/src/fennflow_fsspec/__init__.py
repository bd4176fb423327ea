"""A filesystem of fsspec on the repositories of a unit of work: the protocol `fennflow`."""

from fennflow_fsspec.filesystem import FennFlowFileSystem

__all__ = ["FennFlowFileSystem"]
