"""`ConfigDict`, and the base classes of connector and backend configs."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic import ConfigDict as PydanticConfigDict
from pydantic_core import ErrorDetails

from fennflow._migration import renamed_option
from fennflow.buffers import MAX_BUFFERED_BYTES
from fennflow.connectors.values import Capabilities
from fennflow.exceptions import ConfigException, KeyException

__all__ = ["BackendConfig", "ConfigDict", "ConnectorConfig", "ReconcileConfig"]

MAX_SECONDS = 1e9
"""About 30 years: no clock and no driver overflows when it is added to a time."""

Seconds = Annotated[float, Field(ge=0.001, le=MAX_SECONDS)]


def check_http_url(url: str) -> str:
    """Return the URL of a server if a client can use it.

    Raises:
        ValueError: it is not one, or has a query, which no request would include.
    """
    query, usable = False, url.isprintable() and " " not in url
    try:
        parts = urlsplit(url)
        usable = usable and parts.scheme in {"http", "https"} and parts.port != 0
        usable, query = usable and bool(parts.hostname), bool(parts.query or parts.fragment)
    except ValueError:  # the host or the port
        usable = False
    if not usable:
        message = "must be an http:// or https:// URL with a host and, optionally, a port"
        raise ValueError(message)
    if query:
        message = "must not have a query, which no request would include"
        raise ValueError(message)
    return url


class _Config(BaseModel):
    model_config = PydanticConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        defer_build=True,
    )

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            # A ValidationError would repeat the input, which may hold secrets.
            reasons = "; ".join(
                f"{'.'.join(map(str, detail['loc'])) or 'value'}: {_reason(cls, detail)}"
                for detail in error.errors(include_input=False, include_context=False)
            )
            message = f"{cls.__name__} is not valid: {reasons}"
            raise ConfigException(message) from None


def _reason(config: type[BaseModel], detail: ErrorDetails) -> str:
    name = str(detail["loc"][-1]) if detail["loc"] else ""
    former = renamed_option(name)
    if former is not None:
        return former
    if detail["type"] != "extra_forbidden":
        return detail["msg"].removeprefix("Value error, ")
    near = get_close_matches(name, config.model_fields, n=1)
    return (
        f"there is no such option. Did you mean {near[0]}?" if near else "there is no such option"
    )


class ConnectorConfig(_Config):
    """Base of every connector's configuration.

    Equal configs share one engine on an event loop, so a config is frozen and compares by value.

    Args:
        capabilities: what the store enforces, in place of the probe (protocol P15). Name a
            condition only if the store is known to enforce it: a wrong claim loses data.
    """

    capabilities: Capabilities | None = None


class BackendConfig(_Config):
    """Base of every backend's configuration: frozen, compared by value."""


class ReconcileConfig(_Config):
    """When and how the catalog is compared with the objects in the buckets.

    With any setting, an object under a key that is being written is left alone, and so is
    everything under the reserved prefix.

    Args:
        frequency: `on_start_app`: before the first use of a bucket by an engine;
            `on_session_start`: before its first use in every unit of work; `never`.
        strategy: what to do with objects that FennFlow did not write, and with records.
            `fill_if_empty`: if the catalog has no record of the bucket, all its objects are
            recorded; else differences are only reported, and are not searched for unless a report
            is requested. `insert_missing`: objects without a record get one; records stay as they
            are. `replace`: the catalog becomes what the bucket holds; records of missing objects
            are removed.
        orphans: what to do with objects without a record that this catalog wrote, or one that ended
            with its process, if the catalog is not empty. `report`; `adopt` records them; `delete`
            removes them, which is right only where no memory backend of another process uses the
            bucket. Objects of transactions younger than `max_transaction_age` are only reported.
        adopt_catalogs: ids of other catalogs whose objects count as this one's, for instance of one
            that was lost. Objects of any other catalog are left alone, whatever the settings.
        batch_size: how many keys are examined, and locked if they are changed, at a time; at most
            1,000,000, since they are held in memory.
    """

    frequency: Literal["on_start_app", "on_session_start", "never"] = "on_start_app"
    strategy: Literal["fill_if_empty", "insert_missing", "replace"] = "fill_if_empty"
    orphans: Literal["report", "adopt", "delete"] = "report"
    adopt_catalogs: tuple[str, ...] = ()
    batch_size: Annotated[int, Field(gt=0, le=1_000_000)] = 1000


def _memory_connector() -> ConnectorConfig:
    from fennflow.connectors import InMemoryConnectorConfig

    return InMemoryConnectorConfig()


def _memory_backend() -> BackendConfig:
    from fennflow.backends import InMemoryBackendConfig

    return InMemoryBackendConfig()


class ConfigDict(_Config):
    """The configuration of a unit of work.

    Args:
        connector: where objects are stored; memory by default.
        backend: where the catalog and the journal are stored; memory by default.
        timeout: seconds that a unit of work may take, from its opening to its commit; then its calls
            fail and it cannot commit. `UOW(timeout=...)` overrides it. None for no limit.
        lock_timeout: seconds to wait for a key that another transaction is writing.
        lease_ttl: seconds that a lease lasts without a heartbeat (protocol P22).
        compensation_timeout: seconds that undoing may take after a cancellation (P21).
        recovery_interval: seconds between checks for transactions of crashed processes (P26). With
            None this process finishes only its own transactions, unless `recover()` is called.
        late_write_period: seconds after which a request whose answer was lost can no longer take
            effect (P20); S3 refuses signatures older than 15 minutes.
        max_transaction_age: seconds after which a transaction can no longer commit.
        upload_idle_timeout: seconds for which the source of a stream may give no bytes, for
            instance an upload of a web client; then the call fails, so that it holds no lock.
        max_concurrency: object requests in flight per unit of work.
        max_buffered_bytes: bytes of parts that all uploads and downloads of an engine hold in memory
            together. Each of them may hold one part, whatever the others hold.
        validate_reads: fail the commit if a record that the transaction read was changed.
        hide_pending: write new files to a staging key, too, so that no direct reader of the bucket
            sees them before the commit.
        keep_versions: whether versions that a commit replaces or deletes stay in a versioned
            bucket; if not, apply deletes them for good.
        reconcile: how the catalog is compared with the objects in the buckets.
        reserved_prefix: the prefix in every bucket that belongs to FennFlow.

    Raises:
        ConfigException: an unknown name or a value out of range.

    Example:
        ```python
        from fennflow import ConfigDict

        config = ConfigDict(lock_timeout=1.0, max_concurrency=8)
        print(config.lease_ttl)
        #> 60.0
        ```
    """

    connector: SerializeAsAny[ConnectorConfig] = Field(default_factory=_memory_connector)
    backend: SerializeAsAny[BackendConfig] = Field(default_factory=_memory_backend)
    timeout: Seconds | None = None
    lock_timeout: Annotated[float, Field(ge=0, le=MAX_SECONDS)] = 5.0
    lease_ttl: Seconds = 60.0
    compensation_timeout: Seconds = 30.0
    recovery_interval: Seconds | None = 60.0
    late_write_period: Seconds = 960.0
    max_transaction_age: Seconds = 43200.0
    upload_idle_timeout: Seconds = 60.0
    max_concurrency: Annotated[int, Field(gt=0, le=100_000)] = 32
    max_buffered_bytes: Annotated[int, Field(gt=0, le=1 << 50)] = MAX_BUFFERED_BYTES
    validate_reads: bool = False
    hide_pending: bool = False
    keep_versions: bool = True
    reconcile: ReconcileConfig = Field(default_factory=ReconcileConfig)
    reserved_prefix: Annotated[str, Field(min_length=1, max_length=64)] = ".fennflow"

    @field_validator("connector", mode="before")
    @classmethod
    def _connector(cls, value: object) -> object:
        # Pydantic would build the base class from a dict, but the class determines the plugin.
        return _instance_of(value, ConnectorConfig)

    @field_validator("backend", mode="before")
    @classmethod
    def _backend(cls, value: object) -> object:
        return _instance_of(value, BackendConfig)

    @field_validator("reserved_prefix")
    @classmethod
    def _reserved_prefix(cls, value: str) -> str:
        from fennflow.paths import check_key

        try:
            check_key(value)
        except KeyException as error:
            raise ValueError(str(error)) from None
        # Servers encode other characters differently in a list of uploads.
        if not re.fullmatch(r"[A-Za-z0-9._~/-]+", value):
            message = "may only have letters without accents, digits, '.', '_', '~', '-' and '/'"
            raise ValueError(message)
        return value


def _instance_of(value: object, kind: type[_Config]) -> object:
    if not isinstance(value, kind):
        example = "S3ConnectorConfig" if kind is ConnectorConfig else "SqlalchemyBackendConfig"
        message = (
            f"must be an instance of a {kind.__name__} subclass, such as {example}(...), not "
            f"{type(value).__name__}"
        )
        raise ValueError(message)  # noqa: TRY004 - pydantic turns ValueErrors into its own
    return value
