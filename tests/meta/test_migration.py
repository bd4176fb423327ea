"""Every name that fennflow 0.8.1 exports is here, or in the table that says what to write instead."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[2] / "docs" / "migration.md"
EXPORTED = {
    "fennflow": "ConfigDict UnitOfWork",
    "fennflow.uow": "UnitOfWork UowInspector",
    "fennflow.repositories": "CreateRepository DeletePrefixRepository DeleteRepository "
    "GeneratePresignedUrlPrefixRepository GeneratePresignedUrlRepository GetPrefixRepository "
    "GetRepository ListRepository PutRepository RepoField S3RepoField",
    "fennflow.exceptions": "BaseBackendException BaseConnectorException BaseRepositoryException "
    "CannotParseExtensionException ExtensionCannotBeGuessed FennFlowException FileException "
    "FileNameAndMediaTypeBothNoneException FilenameIsNoneException FilepathsCollisionError "
    "MediaTypeCannotBeGuessedException NoSuchKeyException ReconcileFailedException "
    "RecordAlreadyExistsException RecordLockedException StoragePrefixIsNoneException",
    "fennflow.files": "AudioContent BaseBinary BinaryContent ContentFactory DocumentContent "
    "ImageContent JsonContent MediaType TextContent UrlContent VideoContent",
    "fennflow.files.media": "BaseContent",
    "fennflow.reconciler": "ReconcileConfig ReconcileFrequencyEnum ReconcileStrategyEnum Reconciler",
    "fennflow.connectors": "ConnectorFactory InMemoryConnector InMemoryConnectorConfig S3Connector "
    "S3ConnectorConfig",
    "fennflow.backends": "InMemoryBackendConfig SqlalchemyBackend SqlalchemyBackendConfig",
}
NAMES = [f"{module}.{name}" for module, names in EXPORTED.items() for name in names.split()]


def is_here(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


def replacements() -> dict[str, str]:
    return dict(
        re.findall(r"^\| `(fennflow\.[\w.]+)` \| (.*) \|$", TABLE.read_text(), re.MULTILINE)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_here_or_in_the_table(name: str) -> None:
    assert is_here(name) != (name in replacements())


def test_the_table_names_what_there_is() -> None:
    for instead in replacements().values():
        for name in re.findall(r"`(fennflow\.[\w.]+)`", instead):
            assert is_here(name), name
