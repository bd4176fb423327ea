"""Names and options of fennflow 0.8, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from types import ModuleType

from typing_extensions import override

_EXCEPTIONS = "fennflow.exceptions."
_NAMES: Mapping[str, str] = {
    "fennflow.backends.SqlalchemyBackend": "fennflow.backends.SqlalchemyBackendConfig",
    "fennflow.connectors.ConnectorFactory": "fennflow.hookspecs.ConnectorPlugin",
    "fennflow.connectors.InMemoryConnector": "fennflow.connectors.InMemoryConnectorConfig",
    "fennflow.connectors.S3Connector": "fennflow.connectors.S3ConnectorConfig",
    "fennflow.files.BaseBinary": "fennflow.files.BaseContent",
    "fennflow.files.BinaryContent.from_local_path": "fennflow.files.FileContent.from_local_path, which "
    "reads while it sends, or ContentFactory.from_local_path, which reads the whole file",
    "fennflow.files.MediaType": 'the text itself, such as "text/plain"',
    "fennflow.uow.UowInspector": "fennflow.repositories.RepoField",
    f"{_EXCEPTIONS}BaseRepositoryException": f"{_EXCEPTIONS}FennFlowException",
    f"{_EXCEPTIONS}CannotParseExtensionException": f"{_EXCEPTIONS}MediaTypeCannotBeGuessedException",
    f"{_EXCEPTIONS}ExtensionCannotBeGuessed": f"{_EXCEPTIONS}MediaTypeCannotBeGuessedException",
    f"{_EXCEPTIONS}FileNameAndMediaTypeBothNoneException": f"{_EXCEPTIONS}FileException",
    f"{_EXCEPTIONS}FilenameIsNoneException": "nothing: a file without a name gets one",
    f"{_EXCEPTIONS}StoragePrefixIsNoneException": "nothing: it is never raised",
}
_MODULES: Mapping[str, str] = {
    "fennflow.backends.in_memory": "fennflow.backends",
    "fennflow.backends.sqlalchemy": "fennflow.backends",
    "fennflow.connectors.in_memory": "fennflow.connectors",
    "fennflow.connectors.s3": "fennflow.connectors",
    "fennflow.core": "fennflow",
    "fennflow.files.exceptions": "fennflow.exceptions",
    "fennflow.files.media": "fennflow.files",
    "fennflow.reconciler": "fennflow.ReconcileConfig, whose options take plain texts, and UOW.reconcile()",
}
_OPTIONS: Mapping[str, str] = {
    "database_url": "url",
    "db_schema": "schema_name",
    "table_name": "table_prefix",
}
_PUBLIC = (
    "fennflow",
    "fennflow.files",
    "fennflow.repositories",
    "fennflow.connectors",
    "fennflow.backends",
    "fennflow.exceptions",
    "fennflow.paths",
    "fennflow.responses",
    "fennflow.sync",
    "fennflow.web",
)
_PAGE = 'See the page "From fennflow 0.8" of the documentation (docs/migration.md).'


def renamed(name: str) -> str | None:
    """Return what to use in place of a name of 0.8, with its module; None if it had no such name."""
    instead = _NAMES.get(name)
    return None if instead is None else f"{name} was part of fennflow 0.8. Use {instead}. {_PAGE}"


def renamed_option(name: object) -> str | None:
    """Return what to use in place of an option of 0.8; None if it had no such option."""
    instead = _OPTIONS.get(str(name))
    return None if instead is None else f"it was renamed after fennflow 0.8; use {instead}. {_PAGE}"


class FormerModules(MetaPathFinder):
    """Says what to import in place of a module of 0.8. It is the last finder that Python asks."""

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        instead = _MODULES.get(fullname)
        if instead is not None:
            message = f"{fullname} was a module of fennflow 0.8. Use {instead}. {_PAGE}"
            raise ModuleNotFoundError(message, name=fullname)


def missing(module: str, name: str) -> Exception:
    """Return the error for a name that a module does not have."""
    text = renamed(f"{module}.{name}")
    if text is not None:
        # Not AttributeError: `from x import y` drops its text.
        return ImportError(text, name=module)
    for other in _PUBLIC:
        if not name.startswith("_") and name in import_module(other).__all__:
            # Not AttributeError, for the same reason.
            message = f"{module} has no {name}. It is in {other}: from {other} import {name}"
            return ImportError(message, name=module)
    return AttributeError(f"module {module!r} has no attribute {name!r}")
