"""The fields of a unit of work that bind a repository to a bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from fennflow.backends import Area
from fennflow.exceptions import ConfigException, KeyException, TransactionException
from fennflow.paths import check_key
from fennflow.printable import brief
from fennflow.repositories.base import Repository, mixin_with

if TYPE_CHECKING:
    from typing import Self

    from fennflow.engine.session import Session
    from fennflow.sync import SyncRepository, SyncUnitOfWork
    from fennflow.uow import UnitOfWork

R = TypeVar("R", bound=Repository)
R_co = TypeVar("R_co", bound=Repository, covariant=True)


class RepoField(Generic[R_co]):
    """A field of a unit of work: a repository on a namespace of the connector.

    Args:
        repository: its class.
        namespace: the bucket, container or directory.
        prefix: confines the field to the keys below it, for instance `svc-a/`: paths are relative to
            it, and nothing else is listed, reconciled or adopted.

    Raises:
        ConfigException: the namespace is empty, or has characters that no store or database
            accepts; or no key can begin with the prefix.

    Example:
        ```python
        from fennflow import UnitOfWork
        from fennflow.repositories import CrudRepository, RepoField


        class UOW(UnitOfWork):
            reports = RepoField(CrudRepository, namespace="reports")
        ```
    """

    def __init__(self, repository: type[R_co], *, namespace: str, prefix: str = "") -> None:
        kind, given = cast("object", repository), cast("object", namespace)
        if not isinstance(kind, type) or not issubclass(kind, Repository):
            message = "A RepoField takes a class of repositories, such as CrudRepository."
            raise ConfigException(message)
        if not isinstance(given, str) or not given or not given.isprintable():
            message = (
                f"namespace={brief(given)} is not the name of a bucket: a text of at least one character, "
                "without control characters."
            )
            raise ConfigException(message)
        root = cast("object", prefix)
        try:
            root = check_key(prefix.removesuffix("/")) if root != "" else ""
        except (KeyException, AttributeError, TypeError) as error:
            message = f"prefix={brief(prefix)} cannot be the beginning of a key: {error}"
            raise ConfigException(message) from None
        self._repository = repository
        self._root = root
        self.namespace = namespace
        self.prefix = f"{root}/" if root else ""

    @property
    def area(self) -> Area:
        """The part of the bucket that the repository can see."""
        return Area(self.namespace, self.prefix)

    def bind(self, session: Session) -> R_co:
        """Return the repository, acting in a session."""
        return self._repository(session, self.namespace, root=self._root)

    def using(self, repository: type[R]) -> RepoField[R]:
        """Return a field with another repository class on the same area."""
        return RepoField(repository, namespace=self.namespace, prefix=self.prefix)

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: UnitOfWork, owner: type[UnitOfWork]) -> R_co: ...
    @overload
    def __get__(
        self, instance: SyncUnitOfWork, owner: type[SyncUnitOfWork]
    ) -> SyncRepository[R_co]: ...
    def __get__(self, instance: object, owner: type) -> Any:
        """Return the field of a class; an instance has the repository itself once it is open."""
        if instance is None:
            return self
        message = (
            f"Open it first: async with {owner.__name__}() as uow; without async: "
            f"with {owner.__name__}.sync() as uow."
        )
        raise TransactionException(message)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            """Raise an error that says where the methods of the repository are."""
            message = f"{type(self).__name__!r} object has no attribute {name!r}."
            if mixin_with(name) is not None:
                message += (
                    " This is the field of the class. Its repository belongs to an open unit of work: "
                    f"async with UOW() as uow: await uow.files.{name}(...)."
                )
            raise AttributeError(message, name=name, obj=self)


class S3RepoField(RepoField[R_co]):
    """A `RepoField` with S3's terms.

    Args:
        repository: its class.
        bucket_name: the bucket, which must exist.
        prefix: like that of `RepoField`.
    """

    def __init__(self, repository: type[R_co], *, bucket_name: str, prefix: str = "") -> None:
        super().__init__(repository, namespace=bucket_name, prefix=prefix)


def without_attribute(uow: object, name: str) -> AttributeError:
    """Return the error for an attribute that a unit of work does not have."""
    cls = type(uow)
    message = f"{cls.__name__!r} object has no attribute {name!r}."
    names = list(fields_of(cls))
    if name.startswith("_"):
        pass
    elif not names:
        message += (
            f" It has no repositories. Declare one in the class: {name} = RepoField(CrudRepository, "
            'namespace="...").'
        )
    elif mixin_with(name) is not None:
        message += f" It is a method of repositories: uow.{names[0]}.{name}(...)."
    else:
        message += f" Its repositories are {', '.join(names)}."
    return AttributeError(message, name=name, obj=uow)


def check_fields(cls: type) -> None:
    """Refuse a repository class that is not wrapped in a field: nothing would open it.

    Raises:
        ConfigException: there is one.
    """
    for name, value in vars(cls).items():
        is_class = isinstance(value, type) and issubclass(value, Repository)
        # A repository class that is defined inside the unit of work is found under its own name.
        if is_class and value.__name__ != name:
            message = (
                f"{cls.__name__}.{name} is a class of repositories, not a field. Write {name} = "
                f'RepoField({value.__name__}, namespace="...").'
            )
            raise ConfigException(message)


def fields_of(cls: type) -> dict[str, RepoField[Repository]]:
    """Return the repository fields of a unit of work by name, those of base classes first."""
    return {
        name: cast("RepoField[Repository]", field)
        for base in reversed(cls.__mro__)
        for name, field in vars(base).items()
        if isinstance(field, RepoField)
    }


def areas_of(cls: type) -> list[Area]:
    """Return the areas that the repositories of a unit of work can see, each once."""
    return sorted({field.area for field in fields_of(cls).values()})


def namespaces_of(cls: type) -> list[str]:
    """Return the buckets of a unit of work, each once."""
    return sorted({field.namespace for field in fields_of(cls).values()})
