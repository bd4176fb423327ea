"""The storage that `STORAGES` names."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urljoin

from django.apps import apps
from django.core.exceptions import SuspiciousFileOperation
from django.core.files.base import File
from django.core.files.storage import Storage
from django.utils import timezone
from django.utils.deconstruct import deconstructible
from django.utils.encoding import filepath_to_uri
from django.utils.module_loading import import_string
from typing_extensions import override

from fennflow.config import BackendConfig, ConfigDict, ConnectorConfig
from fennflow.exceptions import (
    ConfigException,
    KeyException,
    NoSuchKeyException,
    RecordAlreadyExistsException,
    RecordLockedException,
)
from fennflow.files import StreamContent
from fennflow.paths import check_key
from fennflow.repositories import (
    CreateRepository,
    CrudRepository,
    GeneratePresignedUrlRepository,
    RepoField,
    StatRepository,
    StreamRepository,
)
from fennflow.sync import SyncUnitOfWork
from fennflow_django.database import backend_config, identity
from fennflow_django.files import StorageFile
from fennflow_django.transactions import acting

if TYPE_CHECKING:
    from fennflow.responses import ObjectInfo


class SuspiciousNameException(KeyException, SuspiciousFileOperation):
    """A name that no file can have: Django answers the request with 400."""


class StorageRepository(
    CrudRepository,
    CreateRepository,
    StatRepository,
    StreamRepository,
    GeneratePresignedUrlRepository,
):
    """The repository of a storage."""


class StorageUnitOfWork(SyncUnitOfWork):
    """The unit of work of a storage; each has a subclass on its own bucket."""

    files = RepoField(StorageRepository, namespace="none")


_classes: list[tuple[object, type[StorageUnitOfWork]]] = []
"""Classes by database and bucket: storages with the same ones share a unit of work in a transaction."""


@deconstructible(path="fennflow_django.FennFlowStorage")
class FennFlowStorage(Storage):
    """Stores files in an object store, as part of `transaction.atomic()`.

    Files that are saved or deleted inside `atomic()` commit with the rows in one database
    transaction, or not at all; nested blocks are savepoints. Outside of it each file commits by
    itself, immediately.

    Args:
        connector: the store: a config such as `S3ConnectorConfig()`, or the dotted path of a config
            or of a function that returns one.
        namespace: the bucket.
        prefix: the prefix of all keys.
        using: alias of the database with the rows, in which the catalog is.
        base_url: the beginning of URLs. None for presigned URLs of the store.
        allow_overwrite: whether a file may replace one of the same name; if not, it gets another name.
        delete_unused: whether a file is deleted when the row that names it is deleted or names
            another one. It needs `fennflow_django` in `INSTALLED_APPS`.
        backend: the catalog's backend, if `backend_config(using)` is not suitable.
        options: those of `ConfigDict` except `connector` and `backend`.

    Raises:
        ConfigException: an option is not known, or has a value out of range.
    """

    def __init__(
        self,
        *,
        connector: ConnectorConfig | str,
        namespace: str,
        prefix: str = "",
        using: str = "default",
        base_url: str | None = None,
        allow_overwrite: bool = False,
        delete_unused: bool = True,
        backend: BackendConfig | None = None,
        **options: Any,
    ) -> None:
        named: Any = import_string(connector) if isinstance(connector, str) else connector
        found: Any = cast("Any", named()) if callable(named) else named
        self._config = ConfigDict(
            connector=found,
            **({} if backend is None else {"backend": backend}),
            **options,
        )
        self._backend = backend
        self._field = RepoField(StorageRepository, namespace=namespace, prefix=prefix)
        self._base_url = base_url
        self._allow_overwrite = allow_overwrite
        self.delete_unused = delete_unused
        self.using = using
        self._found: tuple[object, type[StorageUnitOfWork]] | None = None

    @property
    def unit_of_work(self) -> type[StorageUnitOfWork]:
        """The class of the storage's units of work, for `fennflow_django.unit_of_work` and upkeep."""
        database = identity(self.using)
        if self._found is None or self._found[0] != database:
            self._found = database, self._class_on(database)
        return self._found[1]

    def _class_on(self, database: object) -> type[StorageUnitOfWork]:
        place = self._field.namespace, self._field.prefix
        key = (database, self._config, self._backend, place)
        for known, found in _classes:
            if known == key:
                return found
        if self.delete_unused and not apps.is_installed("fennflow_django"):
            message = (
                "Add 'fennflow_django' to INSTALLED_APPS and run manage.py migrate: without it no file "
                "is deleted whose row is gone. If that is what you want, set delete_unused=False."
            )
            raise ConfigException(message)
        backend = self._backend or backend_config(self.using)
        members = {
            "files": self._field,
            "config": self._config.model_copy(update={"backend": backend}),
        }
        made = type("StorageUnitOfWork", (StorageUnitOfWork,), members)
        _classes.append((key, made))
        return made

    @contextmanager
    def _acting(self, *, writes: bool = False) -> Generator[StorageUnitOfWork]:
        with _translated(), acting(self.unit_of_work, self.using, writes=writes) as uow:
            yield uow

    def _info(self, name: str) -> ObjectInfo:
        with self._acting() as uow:
            return uow.files.stat(_key(name))

    # --- what Django calls -------------------------------------------------------------------------

    def _open(self, name: str, mode: str = "rb") -> File[Any]:
        _key(name)  # before anything is written, which is stored at the end
        return StorageFile(name, mode, read=self._read, look=self._info, put=self._put)

    def _read(self, name: str, start: int, end: int | None) -> tuple[bytes, ObjectInfo]:
        key, begin = _key(name), None if end is None else start
        with self._acting() as uow, uow.files.open(key, start=begin, end=end) as stream:
            return stream.read(), stream.info

    def _save(self, name: str, content: File[Any]) -> str:
        while True:
            try:
                return self._put(name, content)
            except (RecordAlreadyExistsException, RecordLockedException):
                if self._allow_overwrite or not content.seekable():
                    raise
                # Since the call of `exists`, another transaction has taken the name, or is about
                # to.
                name = self.get_available_name(self.get_alternative_name(*_split(name)))

    def _put(self, name: str, content: File[Any], *, overwrite: bool | None = None) -> str:
        key = _key(name)
        file = StreamContent.from_iterable(_chunks(content), filename=key)
        overwrite = self._allow_overwrite if overwrite is None else overwrite
        with self._acting(writes=True) as uow:
            (uow.files.put if overwrite else uow.files.create)(file)
        return key

    @override
    def get_available_name(self, name: str, max_length: int | None = None) -> str:
        if self._allow_overwrite and (max_length is None or len(name) <= max_length):
            return name
        return super().get_available_name(name, max_length=max_length)

    @override
    def delete(self, name: str) -> None:
        if not name:
            message = "The name must be given to delete()."
            raise ValueError(message)
        with self._acting(writes=True) as uow:
            uow.files.delete(_key(name))

    @override
    def exists(self, name: str) -> bool:
        with self._acting() as uow:
            return uow.files.exists(_key(name))

    @override
    def listdir(self, path: str) -> tuple[list[str], list[str]]:
        prefix = _with_slashes(path).strip("/")
        prefix = f"{prefix}/" if prefix else ""
        with self._acting() as uow:
            page = uow.files.list(prefix, delimiter="/")
        names = [str(each).removeprefix(prefix) for each in page]
        folders = [str(each).removeprefix(prefix).rstrip("/") for each in page.prefixes]
        return folders, names

    @override
    def size(self, name: str) -> int:
        return self._info(name).size

    @override
    def get_modified_time(self, name: str) -> datetime:
        return _time(self._info(name).modified_at)

    @override
    def get_created_time(self, name: str) -> datetime:
        return _time(self._info(name).created_at)

    @override
    def url(self, name: str | None) -> str:
        if name is None:
            message = "A file without a name has no URL."
            raise ValueError(message)
        if self._base_url is not None:
            return urljoin(self._base_url, filepath_to_uri(_key(name)))
        with self._acting() as uow:
            [url] = uow.files.generate_presigned_url(_key(name))
        return url


def _key(name: str) -> str:
    """Return the key of a file.

    Raises:
        SuspiciousNameException: no file can have the name.
    """
    with _translated():
        return check_key(_with_slashes(name))


def _with_slashes(name: str) -> str:
    return str(name).replace("\\", "/")


def _split(name: str) -> tuple[str, str]:
    root, dot, extension = name.rpartition(".")
    return (root, dot + extension) if dot and "/" not in extension else (name, "")


def _time(moment: datetime) -> datetime:
    from django.conf import settings

    return moment if settings.USE_TZ else timezone.make_naive(moment)


def _chunks(content: File[Any]) -> Generator[bytes]:
    for chunk in cast("Callable[[], Generator[Any]]", content.chunks)():
        yield chunk.encode() if isinstance(chunk, str) else bytes(chunk)


@contextmanager
def _translated() -> Generator[None]:
    """Raise what Django expects of a storage."""
    try:
        yield
    except NoSuchKeyException as error:
        raise FileNotFoundError(str(error)) from error
    except SuspiciousNameException:
        raise
    except KeyException as error:
        raise SuspiciousNameException(str(error), reason=error.reason) from error
