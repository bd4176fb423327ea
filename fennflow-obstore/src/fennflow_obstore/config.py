"""The configuration of the connector on obstore."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, field_validator
from typing_extensions import override

from fennflow.config import ConnectorConfig, check_http_url

if TYPE_CHECKING:
    from fennflow.connectors import Capabilities

MiB = 1 << 20
_ENDPOINT = re.compile(r"^(?!use_|.*_use_).*(endpoint|endpoint_url|base_url)$")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
SCHEMES = frozenset({"s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "file", "memory"})


class ObstoreConnectorConfig(ConnectorConfig):
    """A store that obstore supports, by URL.

    A namespace is appended to the URL: with `s3://` it is a bucket, with `s3://bucket/team` a
    prefix under `team/` in that bucket, with `file:///srv/files` a directory in that directory.

    Args:
        url: `s3://`, `gs://`, `az://`, `file:///directory` or `memory:///name`, without
            credentials. A store in memory is shared by all configs in the process that use its
            name.
        options: the options of the store, by obstore's names (`S3Config`, `GCSConfig`,
            `AzureConfig`), for instance `region` and `endpoint`; never shown. Missing options come
            from the environment (`AWS_ACCESS_KEY_ID`, `GOOGLE_SERVICE_ACCOUNT`,
            `AZURE_STORAGE_ACCOUNT_NAME` …).
        client_options: the options of the HTTP client, by obstore's names (`ClientConfig`).
            `allow_http` is set if `endpoint` begins with `http://`.
        max_attempts: the total number of attempts of a request.
        part_size: the size of a part of a stream in bytes, 5 MiB to 5 GiB.
        max_collected: the size in bytes up to which a stream is collected in memory and sent in one
            request. A longer stream is sent in parts, for a new key to a staging key: obstore
            supports conditions only for single requests.
        file_mode: the mode of local files that are written, for instance `0o644` if other users may
            read them. By default they are private, since they contain metadata.
        directory_mode: the mode of local directories that are created.
        capabilities: what the namespaces enforce, in place of the probe.

    Raises:
        ConfigException: a URL of another kind or with credentials, or a value out of range.

    Example:
        ```python
        from fennflow.connectors import ObstoreConnectorConfig

        config = ObstoreConnectorConfig(
            url="s3://",
            options={"region": "us-east-1", "endpoint": "http://localhost:9000"},
        )
        ```
    """

    url: str
    options: Annotated[Mapping[str, SecretStr], Field(repr=False)] = {}
    client_options: Annotated[Mapping[str, Any], Field(repr=False)] = {}
    max_attempts: Annotated[int, Field(gt=0, le=1000)] = 5
    part_size: Annotated[int, Field(ge=5 * MiB, le=5 * 1024 * MiB)] = 8 * MiB
    max_collected: Annotated[int, Field(ge=0, le=5 * 1024 * 1024 * MiB)] = 8 * MiB
    file_mode: Annotated[int, Field(ge=0o600, le=0o777)] = 0o600
    directory_mode: Annotated[int, Field(ge=0o700, le=0o777)] = 0o700

    if TYPE_CHECKING:
        # Type checkers use the types of the fields for the arguments, but a secret may be given as
        # a str.
        def __init__(
            self,
            *,
            url: str,
            options: Mapping[str, str | SecretStr] | Mapping[str, str] = ...,
            client_options: Mapping[str, Any] = ...,
            max_attempts: int = ...,
            part_size: int = ...,
            max_collected: int = ...,
            file_mode: int = ...,
            directory_mode: int = ...,
            capabilities: Capabilities | None = ...,
        ) -> None: ...

    @field_validator("url")
    @classmethod
    def _known(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or "://" not in url:
            message = (
                f"must begin with one of {', '.join(f'{each}://' for each in sorted(SCHEMES))}"
            )
            raise ValueError(message)
        # In abfs:// the container comes before an "@"; no bucket has a ":".
        named = parts.scheme in {"abfs", "abfss"} and parts.password is None
        local = parts.scheme in {"file", "memory"}
        secret = not local and ("@" in url or ":" in parts.netloc) and not named
        if parts.password is not None or secret or parts.query or parts.fragment:
            message = "must have neither credentials nor a query; use options"
            raise ValueError(message)
        if parts.scheme == "file" and (
            parts.netloc or not parts.path.startswith("/") or "\0" in unquote(parts.path)
        ):
            message = "must name an absolute directory, as in file:///srv/files"
            raise ValueError(message)
        return url

    @field_validator("options")
    @classmethod
    def _usable(cls, options: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
        for name, secret in options.items():
            value = secret.get_secret_value()
            if _URL.match(value) and "@" in value:
                message = f"{name} must not contain credentials; use options such as access_key_id"
                raise ValueError(message)
            # obstore accepts these, but panics at the first request.
            if _ENDPOINT.search(name.lower()):
                try:
                    check_http_url(value)
                except ValueError as error:
                    message = f"{name} {error}"
                    raise ValueError(message) from None
            if _CONTROL.search(value) and not value.lstrip().startswith("{"):
                message = (
                    f"{name} must not contain control characters, such as a line break at its end"
                )
                raise ValueError(message)
        return options

    @override
    def __hash__(self) -> int:
        """Return equal hashes for equal configs, although dictionaries have no hash."""
        return hash(self.url)

    @property
    def scheme(self) -> str:
        """The scheme of the URL."""
        return urlsplit(self.url).scheme

    @property
    def speaks_s3(self) -> bool:
        """Whether the store is S3 or compatible with it."""
        return self.scheme in {"s3", "s3a"}
