"""The base class of repositories: a bucket, seen from a scope, inside a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from fennflow.backends import ObjectKey
from fennflow.engine import reading
from fennflow.exceptions import ConfigException, TransactionException
from fennflow.paths import AnyPath, StoragePath, check_key, check_prefix, join_key, render_path

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import Self

    from fennflow.engine.session import Session
    from fennflow.engine.transaction import Transaction

PAGE = 1000
"""Keys on a page of a listing, and in a batch of prefix operations; the same as S3's limit."""


_OTHER_NAMES = {
    **dict.fromkeys(
        ("add", "save", "store", "upload", "write", "write_bytes", "write_text"), "put"
    ),
    **dict.fromkeys(("download", "fetch", "load"), "get"),
    **dict.fromkeys(("remove", "rm", "unlink"), "delete"),
    **dict.fromkeys(("head", "info", "size"), "stat"),
    **dict.fromkeys(("listdir", "ls"), "list"),
    **dict.fromkeys(("glob", "walk"), "iter"),
    **dict.fromkeys(("presign", "url"), "generate_presigned_url"),
    "read": "read_bytes",
    "rename": "move",
}
"""Names of methods in other libraries, and their names here."""


class _InAnyOrder(type):
    """Lets users list mixins in any order, although `CrudRepository` combines several of them.

    Python refuses bases whose orders contradict each other. For mixins the order has no effect:
    each defines its own methods.
    """

    @override
    def mro(cls) -> list[type]:
        try:
            return super().mro()
        except TypeError:
            bases = [each for base in cls.__bases__ for each in base.__mro__]
            # Keep the last occurrence of each class: it comes after all of its subclasses.
            return [cls, *reversed(dict.fromkeys(reversed(bases)))]


class Repository(metaclass=_InAnyOrder):
    """Base of all repositories: a bucket, seen from a scope.

    Args:
        session: the session in which the methods act.
        namespace: the bucket.
        scope: prefix of all relative paths, without a trailing `/`; empty at the root.
        root: the prefix of all keys of the field, without a trailing `/`; empty for the whole
            bucket. Paths do not include it.
    """

    def __init__(
        self,
        session: Session | None = None,
        namespace: str = "",
        scope: str = "",
        *,
        root: str = "",
    ) -> None:
        if session is None or isinstance(session, str):
            message = (
                "A unit of work makes its repositories itself. Declare this one in its class: "
                f'files = RepoField({type(self).__name__}, namespace="my-bucket").'
            )
            raise ConfigException(message)
        self._session = session
        self._namespace = namespace
        self._scope = scope
        self._root = root

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            """Raise an error that names the mixin with a method that this repository does not have."""
            own = type(self).__name__
            message = f"{own!r} object has no attribute {name!r}."
            method = _OTHER_NAMES.get(name, name)
            if method != name:
                message += f" FennFlow calls it {method}()."
            mixin = None if name.startswith("_") else mixin_with(method)
            if mixin is not None and not hasattr(type(self), method):
                name_of = "Files" if type(self).__module__.startswith("fennflow.") else own
                message += (
                    " Add the mixin that has it: "
                    f"class {name_of}({own if name_of != own else '...'}, {mixin.__name__})."
                )
            raise AttributeError(message, name=name, obj=self)

    def at(self, path: AnyPath) -> Self:
        """Return the same repository in a narrower scope; scopes nest.

        Args:
            path: relative to the current scope; a trailing `/` is optional.

        Raises:
            KeyException: the path breaks the key rules, for instance has a `..` segment.
        """
        rendered = render_path(path)
        bare = rendered.removesuffix("/")
        relative = StoragePath(bare) if isinstance(rendered, StoragePath) else bare
        scope = check_key(join_key(self._scope, relative))
        return type(self)(self._session, self._namespace, scope, root=self._root)

    @property
    def cwd(self) -> StoragePath:
        """The scope, from the root of the bucket or of the field's prefix."""
        return StoragePath(self._scope)

    def _call(self, operation: str) -> AbstractAsyncContextManager[Transaction]:
        return self._session.call(operation, self._namespace)

    def _key(self, path: AnyPath) -> str:
        rendered = render_path(path)
        if not isinstance(rendered, StoragePath):
            check_key(rendered)
        path_from_root = check_key(join_key(self._scope, rendered))
        return check_key(join_key(self._root, str(path_from_root)))

    def _path(self, key: str) -> StoragePath:
        """Return the path that users see for a key or a common prefix."""
        return StoragePath(key.removeprefix(f"{self._root}/") if self._root else key)

    def _object_key(self, path: AnyPath, repository: Repository | None = None) -> ObjectKey:
        """Return the key of a path here, or in another repository of the same session."""
        other = repository or self
        if other._session is not self._session:  # noqa: SLF001 - of this class
            message = "The two repositories do not belong to the same unit of work."
            raise TransactionException(message)
        return ObjectKey(other._namespace, other._key(path))  # noqa: SLF001 - as above

    def _prefix(self, prefix: str) -> str:
        rendered = render_path(prefix)
        if not isinstance(rendered, StoragePath):
            check_prefix(rendered)
        prefix_from_root = check_prefix(join_key(self._scope, rendered))
        return check_prefix(join_key(self._root, str(prefix_from_root)))

    async def _pages(self, tx: Transaction, prefix: str) -> AsyncGenerator[Sequence[str]]:
        """Iterate over the keys with a prefix, up to a thousand at a time, within one call."""
        start: str | None = ""
        while start is not None:
            page = await self._page(tx, prefix, start)
            yield page.keys
            start = page.start

    async def _page(self, tx: Transaction, prefix: str, start: str) -> reading.Page:
        return await reading.page(
            tx,
            self._namespace,
            prefix=self._prefix(prefix),
            start=start,
            limit=PAGE,
            delimiter=None,
        )


def mixin_with(name: str) -> type[Repository] | None:
    """Return FennFlow's mixin that has a method."""
    mixins = Repository.__subclasses__()
    for mixin in mixins:
        if mixin.__module__.startswith("fennflow."):
            if name in vars(mixin) and not mixin.__name__.startswith("_"):
                return mixin
            mixins += mixin.__subclasses__()
    return None
