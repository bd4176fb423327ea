"""Every name that fennflow 0.8.1 exports is here, or in the table that says what to write instead."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from fennflow import _migration
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.exceptions import ConfigException, FileException
from fennflow.files import ImageContent, TextContent

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


@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if not is_here(name)],
)
def test_an_import_of_a_former_name_says_what_to_write(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(ImportError, match=r"docs/migration\.md"):
        getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("module", _migration._MODULES)
def test_an_import_of_a_former_module_says_what_to_write(module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"docs/migration\.md"):
        importlib.import_module(module)


def test_a_file_from_disk_is_made_by_another_class() -> None:
    formers: list[Any] = [ImageContent, TextContent]
    for former in formers:
        with pytest.raises(FileException, match=r"FileContent.*docs/migration\.md"):
            former.from_local_path("a.png")


def test_an_option_of_0_8_is_named_with_its_new_name() -> None:
    options: Any = {"database_url": "sqlite:///a.db"}
    with pytest.raises(ConfigException, match=r"database_url: .* use url\. .*docs/migration\.md"):
        SqlalchemyBackendConfig(**options)


def test_the_table_names_what_there_is() -> None:
    for instead in replacements().values():
        for name in re.findall(r"`(fennflow\.[\w.]+)`", instead):
            assert is_here(name), name
