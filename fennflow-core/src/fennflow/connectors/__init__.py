"""The contract of a connector, and the connector configs that plugins provide, by name.

A connector does object I/O and knows nothing of transactions. The engine calls it; it never calls
back, except for `on_upload`. The methods and when they are called:

| method | called | must hold on return |
| --- | --- | --- |
| `open`, `aclose` | once each, first and last, on one event loop | |
| `validate` | before any I/O of a call | |
| `probe` | before the first write to a namespace | its test objects are removed |
| `put`, `upload`, `copy` | in a transaction before the pivot; `copy` after it | the object is complete and durable |
| `get`, `stream`, `head`, `list`, `versions`, `recent_versions` | at any time | reads see every write that returned before |
| `delete`, `abort_upload` | after the pivot, or to undo | the named objects or uploads are gone |
| `uploads` | by the sweep (P27) | |

What an exception means: the `ambiguous` of a `BaseConnectorException` says whether the request may
have taken effect, or still may; with any other exception that is unknown, too (protocol P19).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fennflow.connectors import metadata as metadata
from fennflow.connectors.contract import (
    Connector,
    PresignMethod,
    ProbeMemory,
    UploadMethod,
    check_etag,
)
from fennflow.connectors.headers import headers_of
from fennflow.connectors.values import (
    Capabilities,
    CopyRequest,
    CopySource,
    Deletion,
    DeletionReport,
    LifecycleRules,
    Location,
    ObjectAttributes,
    PendingUpload,
    PresignedRequest,
    PutRequest,
    StoredObject,
    UploadCallback,
    UploadTerms,
    check_attributes,
)
from fennflow.plugins import config_class

if TYPE_CHECKING:
    from fennflow_memory import InMemoryConnectorConfig as InMemoryConnectorConfig
    from fennflow_obstore import ObstoreConnectorConfig as ObstoreConnectorConfig
    from fennflow_s3 import S3ConnectorConfig as S3ConnectorConfig
else:

    def __getattr__(name: str) -> object:
        return config_class("connector", name, __name__)


__all__ = [
    "Capabilities",
    "Connector",
    "CopyRequest",
    "CopySource",
    "Deletion",
    "DeletionReport",
    "InMemoryConnectorConfig",
    "LifecycleRules",
    "Location",
    "ObjectAttributes",
    "ObstoreConnectorConfig",
    "PendingUpload",
    "PresignMethod",
    "PresignedRequest",
    "ProbeMemory",
    "PutRequest",
    "S3ConnectorConfig",
    "StoredObject",
    "UploadCallback",
    "UploadMethod",
    "UploadTerms",
    "check_attributes",
    "check_etag",
    "headers_of",
]
