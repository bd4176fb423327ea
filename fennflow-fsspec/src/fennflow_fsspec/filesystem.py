"""The filesystem."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

from fsspec import AbstractFileSystem
from fsspec.compression import compr  # pyright: ignore[reportUnknownVariableType]
from fsspec.core import get_compression, has_magic  # pyright: ignore[reportUnknownVariableType]
from fsspec.transaction import Transaction

from fennflow.exceptions import (
    ConfigException,
    FilepathsCollisionError,
    KeyException,
    NoSuchKeyException,
    RecordAlreadyExistsException,
)
from fennflow.files import StreamContent
from fennflow.paths import check_key
from fennflow.printable import printable
from fennflow.repositories.fields import fields_of
from fennflow.sync import SyncUnitOfWork
from fennflow.uow import UnitOfWork
from fennflow_fsspec.files import CompressedFile, FennFlowFile, TextFile
from fennflow_fsspec.transactions import Transactions

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from fennflow.responses import ObjectInfo

_Base: Any = AbstractFileSystem
_Cached: Any = type(AbstractFileSystem)
_Transaction: Any = Transaction


class _CachedByClass(_Cached):  # type: ignore[misc]
    """Returns a cached filesystem only for the same class, not for another class with the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        make: Any = base.__call__
        found: Any = make(*args, **kwargs)
        given = args[0] if args else kwargs.get("uow")
        if isinstance(given, type) and found.uow is not given:
            self._cache.pop(found._fs_token, None)  # noqa: SLF001 - of its base class
            found = make(*args, **kwargs)
        return found


class UnitOfWorkTransaction(_Transaction):  # type: ignore[misc]
    """`with fs.transaction`: a unit of work, and inside one a savepoint."""

    def __enter__(self) -> Self:
        """Begin it."""
        self.fs.transactions.begin()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Commit, or undo all of it if an exception leaves the block."""
        self.fs.transactions.end(exc_type, exc_val, exc_tb)

    def start(self) -> None:
        """Begin it."""
        self.fs.transactions.begin()

    def complete(self, commit: bool = True) -> None:  # noqa: FBT001, FBT002 - as fsspec calls it
        """Commit, or undo all of it."""
        if commit:
            self.fs.transactions.end()
        else:
            error = _DiscardedError("The transaction was discarded.")
            self.fs.transactions.end(type(error), error, None)


class _NoSuchPathError(KeyException, FileNotFoundError):
    """No file can have a path, so there is none."""


class _DiscardedError(Exception):
    """A transaction was ended with `complete(commit=False)`."""


class _Moves:
    """The files that a call of `mv()` copies and then deletes."""

    def __init__(self) -> None:
        self.sources: set[str] = set()
        self._targets: set[str] = set()

    def add(self, source: str, target: str) -> None:
        """Note a planned copy."""
        self.sources.add(source)
        self._targets.add(target)
        both = {source, target} & self.sources & self._targets
        if both:
            message = f"{', '.join(both)} would be both source and target, so nothing is moved."
            raise FilepathsCollisionError(message)


class FennFlowFileSystem(_Base, metaclass=_CachedByClass):  # type: ignore[misc]
    """The repositories of a unit of work as a filesystem of fsspec: `fennflow://FIELD/PATH`.

    The first part of a path is the name of a field of the unit of work. Inside `with fs.transaction`
    everything is done by one unit of work: it commits at the end of the block, or is undone as a
    whole if an exception leaves it. Blocks inside it are savepoints. Outside of it, each call
    commits by itself, even with many files (`put`, `mv`, `rm`), and a written file commits when it
    is closed.

    Args:
        uow: the class of the unit of work, or its import path: `module:UOW`. It is required; it has
            a default only because fsspec creates filesystems from the name of the protocol alone,
            which raises an error that says so.
        options: those of `AbstractFileSystem`.

    Raises:
        ConfigException: it is missing, or there is no such class.

    Example:
        ```python
        import fsspec

        from fennflow import UnitOfWork
        from fennflow.repositories import CrudRepository, RepoField, StatRepository, StreamRepository


        class FileRepository(CrudRepository, StatRepository, StreamRepository):
            pass


        class UOW(UnitOfWork):
            data = RepoField(FileRepository, namespace="data")


        fs = fsspec.filesystem("fennflow", uow=UOW)
        try:
            with fs.transaction:
                fs.pipe("data/a.txt", b"Hello")
                raise ValueError
        except ValueError:
            print(fs.ls("data"))
            #> []
        ```
    """

    protocol = "fennflow"
    root_marker = ""
    transaction_type = UnitOfWorkTransaction

    def __init__(
        self, uow: type[UnitOfWork | SyncUnitOfWork] | str | None = None, **options: Any
    ) -> None:
        if self._cached:
            return
        if uow is None:
            message = (
                "fennflow:// needs a unit of work. Pass its class, or its import path 'module:UOW': "
                "storage_options={'uow': UOW} for pandas and others, fsspec.filesystem('fennflow', "
                "uow=UOW), or fsspec.open(url, uow=UOW)."
            )
            raise ConfigException(message)
        base: Any = super()
        base.__init__(uow=uow, **options)
        found = _imported(uow) if isinstance(uow, str) else uow
        if not isinstance(found, type) or not issubclass(found, (UnitOfWork, SyncUnitOfWork)):
            message = f"uow={uow!a} is not a unit of work class or the module:NAME of one."
            raise ConfigException(message)
        self.uow = found
        self._fields = dict(sorted(fields_of(found).items()))
        self._reserved = found.config.reserved_prefix
        make: Callable[[], Any] = found.sync if issubclass(found, UnitOfWork) else found
        self.transactions = Transactions(make)

    # --- transactions ------------------------------------------------------------------------------

    def start_transaction(self) -> Any:
        """Begin a transaction without a block."""
        self.transactions.begin()
        return self.transaction

    def end_transaction(self) -> None:
        """Commit it."""
        self.transactions.end()

    def invalidate_cache(self, path: str | None = None) -> None:
        """Do nothing: listings are not cached."""

    # --- reading -----------------------------------------------------------------------------------

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:  # noqa: FBT001, FBT002 - as fsspec calls it
        """List a directory; the root contains the fields of the unit of work."""
        path = self._strip_protocol(path).rstrip("/")
        found: list[dict[str, Any]]
        if path:
            field, key = self._place(path)
            prefix = f"{key}/" if key else ""
            with self._acting(field) as repository:
                page = repository.list(prefix, delimiter="/")
            found = [_file(field, info) for info in page.infos]
            found += [_directory(f"{field}/{each}".rstrip("/")) for each in page.prefixes]
            if not found and key:
                found = [self.info(path)]
        else:
            found = [_directory(field) for field in self._fields]
        found.sort(key=lambda each: each["name"])
        return found if detail else [each["name"] for each in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return the catalog's information about a file or a directory."""
        path = self._strip_protocol(path).rstrip("/")
        if not path:
            return _directory("")
        field, key = self._place(path)
        if not key:
            return _directory(field)
        with self._acting(field) as repository:
            try:
                return _file(field, repository.stat(key))
            except NoSuchKeyException:
                if repository.list(f"{key}/", limit=1):
                    return _directory(path)
                raise

    def created(self, path: str) -> datetime:
        """Return when a file was created."""
        return cast("datetime", self._file_info(path)["created"])

    def modified(self, path: str) -> datetime:
        """Return when a file was written."""
        return cast("datetime", self._file_info(path)["LastModified"])

    def ukey(self, path: str) -> str:
        """Return a text that changes with the content of a file."""
        return self.content_of(self._file_info(path))

    def sign(self, path: str, expiration: float = 100, **_: Any) -> str:
        """Return a presigned URL."""
        field, key = self._place(self._strip_protocol(path))
        with self._acting(field) as repository:
            [url] = repository.generate_presigned_url(key, expires_in=expiration)
        return str(url)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Return the bytes of a file, or a range of them."""
        path = self._strip_protocol(path)
        if start is None and end is None:
            return self.read_part(path, None, None)[0]
        size: int = self.info(path)["size"]
        begin, stop, _step = slice(start, end).indices(size)
        return self.read_part(path, begin, stop)[0] if begin < stop else b""

    # --- writing -----------------------------------------------------------------------------------

    def open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        cache_options: dict[str, Any] | None = None,
        compression: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Open a file; a written file is stored when it is closed."""
        # The file belongs to the unit of work, and does not wait for another commit.
        kwargs["autocommit"] = kwargs.get("autocommit", True)
        base: Any = super()
        if "r" in mode:
            return base.open(path, mode, block_size, cache_options, compression, **kwargs)
        # fsspec's wrappers store a partial file after an exception, or lose all of it.
        text = {key: kwargs.pop(key) for key in _TEXT & kwargs.keys()}
        codec = get_compression(path, compression)
        kind = mode.replace("t", "").replace("b", "")
        file: Any = base.open(path, f"{kind}b", block_size, cache_options, **kwargs)
        if codec is not None:
            file = CompressedFile(file, compr[codec](file, mode=kind.replace("x", "w")))
        return file if "b" in mode else TextFile(file, **text)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> FennFlowFile:
        self._place(path, "file")
        if mode == "xb" and self.isfile(path):
            message = f"{printable(path)} exists already."
            raise FileExistsError(message)
        return FennFlowFile(self, path, mode, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write a file."""
        path = self._strip_protocol(path)
        self.store(path, io.BytesIO(value), create=mode == "create")

    def store(self, path: str, source: Any, *, create: bool) -> None:
        """Write a file from an open one."""
        field, key = self._place(path, "file")
        content = StreamContent.from_iterable(source, filename=key)
        with self._acting(field) as repository:
            (repository.create if create else repository.put)(content)

    def cp_file(self, path1: str, path2: str, *, moves: _Moves | None = None, **_: Any) -> None:
        """Copy a file inside the store; directories have nothing to copy."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.isdir(path1):
            return
        if moves is not None:
            moves.add(path1, path2)
        (field, key), (target, name) = self._place(path1, "file"), self._place(path2, "file")
        with _translated(), self.transactions.acting() as uow:
            repository: Any = getattr(uow, field)
            repository.copy(key, name, to=getattr(uow, target))

    def rm_file(self, path: str) -> None:
        """Delete a file."""
        field, key = self._place(self._strip_protocol(path), "file")
        with self._acting(field) as repository:
            repository.delete(key, missing_ok=False)

    def _rm(self, path: str) -> None:
        self.rm_file(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:  # noqa: FBT001, FBT002 - as fsspec calls it
        """Delete files and directories, all or none of them."""
        with self.transactions.together():
            paths: list[Any] = [path] if isinstance(path, (str, PathLike)) else list(path)
            if not recursive:
                self._refuse_directories(paths)
            for each in self.expand_path(paths, recursive=recursive, maxdepth=maxdepth):
                if not self.isdir(each):
                    self.rm_file(each)

    def _refuse_directories(self, paths: Iterable[Any]) -> None:
        for each in paths:
            name = self._strip_protocol(each)
            if not has_magic(name) and self.isdir(name):
                message = f"{printable(name)} is a directory. Pass recursive=True to include its contents."
                raise IsADirectoryError(message)

    def pipe(
        self, path: str | Mapping[str, bytes], value: bytes | None = None, **kwargs: Any
    ) -> None:
        """Write files, all or none of them."""
        with self.transactions.together():
            base: Any = super()
            base.pipe(path, value, **kwargs)

    def put(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> None:
        """Write local files, all or none of them."""
        with self.transactions.together():
            base: Any = super()
            base.put(lpath, rpath, *args, **kwargs)

    def copy(self, path1: Any, path2: Any, *args: Any, **kwargs: Any) -> None:
        """Copy files, all or none of them."""
        with self.transactions.together():
            base: Any = super()
            base.copy(path1, path2, *args, **kwargs)

    def mv(
        self,
        path1: Any,
        path2: Any,
        recursive: bool = False,  # noqa: FBT001, FBT002 - as fsspec calls it
        maxdepth: int | None = None,
        **_: Any,
    ) -> None:
        """Move files, all or none of them.

        Raises:
            FilepathsCollisionError: a file is both a source and a target.
        """
        if path1 == path2:
            return
        lists = isinstance(path1, list) and isinstance(path2, list)  # copy() does not expand these
        moves = _Moves()
        with self.transactions.together():
            if lists or not recursive:
                one = isinstance(path1, (str, PathLike))
                self._refuse_directories([path1] if one else cast("Iterable[Any]", path1))
            # fsspec's mv deletes the files that it finds after the copy, even those that were not
            # copied.
            self.copy(path1, path2, recursive, maxdepth, on_error="raise", moves=moves)
            for each in sorted(moves.sources):
                self.rm_file(each)

    # --- for files ---------------------------------------------------------------------------------

    def read_part(
        self, path: str, start: int | None, end: int | None
    ) -> tuple[bytes, dict[str, Any]]:
        """Return bytes of a file, and the catalog's information about it."""
        field, key = self._place(path)
        with self._acting(field) as repository, repository.open(key, start=start, end=end) as file:
            return file.read(), _file(field, file.info)

    @staticmethod
    def content_of(info: Mapping[str, Any]) -> str:
        """Return a value that differs if the content of a file differs."""
        return str(info["sha256"] or info["ETag"])

    # --- of this class -----------------------------------------------------------------------------

    def _place(self, path: str, wanted: str = "") -> tuple[str, str]:
        """Return the field of a path, and the path in its repository.

        Raises:
            FileNotFoundError: there is no such field, or no file can have the path.
        """
        field, _, key = path.rstrip("/").partition("/")
        if field not in self._fields:
            message = (
                f"{printable(path)}: the unit of work has no field {printable(field)}. It has "
                f"{', '.join(self._fields)}."
            )
            raise FileNotFoundError(message)
        if wanted and not key:
            message = f"{printable(path)} is the root of a repository, not a file."
            raise IsADirectoryError(message)
        if key:
            try:
                check_key(f"{self._fields[field].prefix}{key}", reserved_prefix=self._reserved)
            except KeyException as error:
                raise _NoSuchPathError(str(error), reason=error.reason) from error
        return field, key

    def _file_info(self, path: str) -> dict[str, Any]:
        """Return what the catalog says of a file.

        Raises:
            IsADirectoryError: the path names a directory.
        """
        info = self.info(path)
        if info["type"] == "directory":
            message = (
                f"{printable(info['name'])} is a directory, which has no times and no content."
            )
            raise IsADirectoryError(message)
        return info

    @contextmanager
    def _acting(self, field: str) -> Generator[Any]:
        with _translated(), self.transactions.acting() as uow:
            yield getattr(uow, field)


@contextmanager
def _translated() -> Generator[None]:
    try:
        yield
    except NoSuchKeyException as error:
        raise FileNotFoundError(str(error)) from error
    except RecordAlreadyExistsException as error:
        raise FileExistsError(str(error)) from error


_TEXT = frozenset({"encoding", "errors", "newline"})


def _imported(place: str) -> object:
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        return None
    return getattr(import_module(module), name, None)


def _directory(name: str) -> dict[str, Any]:
    return {"name": name, "size": 0, "type": "directory"}


def _file(field: str, info: ObjectInfo) -> dict[str, Any]:
    return {
        "name": f"{field}/{info.path}",
        "size": info.size,
        "type": "file",
        "ETag": info.etag,
        "sha256": info.sha256,
        "LastModified": info.modified_at,
        "created": info.created_at,
        "media_type": info.media_type,
    }
