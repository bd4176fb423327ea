"""The configuration of the S3 connector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator

from fennflow.config import ConnectorConfig, check_http_url

if TYPE_CHECKING:
    from aiobotocore.config import AioConfig

    from fennflow.connectors import Capabilities

MiB = 1 << 20
Checksums = Literal["when_required", "when_supported"]


class S3ConnectorConfig(ConnectorConfig):
    """A store with the S3 API.

    Missing values come from the AWS chain: environment (`AWS_ACCESS_KEY_ID`, `AWS_REGION`,
    `AWS_ENDPOINT_URL` …), shared files, roles.

    Args:
        aws_access_key_id: of the credentials.
        aws_secret_access_key: of the credentials; never shown.
        aws_session_token: of temporary credentials; never shown.
        region_name: for instance `eu-central-1`.
        endpoint_url: of an S3-compatible server; without credentials.
        presign_endpoint_url: the endpoint in presigned URLs, if clients reach the server under
            another name than `endpoint_url`.
        profile_name: the profile in the shared files.
        addressing_style: how the bucket is named: in the host name, or in the path.
        max_pool_connections: open connections for requests; at least `max_concurrency`. Open
            downloads have as many in addition.
        max_attempts: the total number of attempts of a request, in botocore's `standard` retry
            mode.
        multipart_threshold: the size in bytes from which on a body is sent in parts.
        multipart_part_size: the size of a part in bytes, 5 MiB to 5 GiB.
        multipart_copy_threshold: the size in bytes above which an object is copied in parts; S3
            copies at most 5 GiB in one request.
        request_checksum_calculation: botocore's setting: whether it adds its own checksum to each
            request that can have one. FennFlow itself sends a SHA-256 if the store accepts it.
        response_checksum_validation: botocore's setting. FennFlow itself compares the SHA-256.
        aiobotocore_config: an `aiobotocore.config.AioConfig`, which overrides the other fields.
        capabilities: what the bucket enforces, in place of the probe.

    Raises:
        ConfigException: a value out of range, or an endpoint URL with credentials.

    Example:
        ```python
        from fennflow.connectors import S3ConnectorConfig

        config = S3ConnectorConfig(endpoint_url="http://localhost:9000", region_name="us-east-1")
        ```
    """

    aws_access_key_id: Annotated[str | None, Field(repr=False)] = None
    aws_secret_access_key: SecretStr | None = None
    aws_session_token: SecretStr | None = None
    region_name: str | None = None
    endpoint_url: str | None = None
    presign_endpoint_url: str | None = None
    profile_name: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    max_pool_connections: Annotated[int, Field(gt=0, le=100_000)] = 50
    max_attempts: Annotated[int, Field(gt=0, le=1000)] = 5
    multipart_threshold: Annotated[int, Field(ge=5 * MiB, le=5 * 1024 * MiB)] = 64 * MiB
    multipart_part_size: Annotated[int, Field(ge=5 * MiB, le=5 * 1024 * MiB)] = 8 * MiB
    multipart_copy_threshold: Annotated[int, Field(ge=5 * MiB, le=5 * 1024 * MiB)] = 5 * 1024 * MiB
    request_checksum_calculation: Checksums = "when_required"
    response_checksum_validation: Checksums = "when_required"
    aiobotocore_config: Annotated[Any, Field(repr=False)] = None

    if TYPE_CHECKING:
        # Type checkers use the types of the fields for the arguments, but a secret may be given as
        # a str.
        def __init__(
            self,
            *,
            aws_access_key_id: str | None = ...,
            aws_secret_access_key: str | SecretStr | None = ...,
            aws_session_token: str | SecretStr | None = ...,
            region_name: str | None = ...,
            endpoint_url: str | None = ...,
            presign_endpoint_url: str | None = ...,
            profile_name: str | None = ...,
            addressing_style: Literal["auto", "path", "virtual"] = ...,
            max_pool_connections: int = ...,
            max_attempts: int = ...,
            multipart_threshold: int = ...,
            multipart_part_size: int = ...,
            multipart_copy_threshold: int = ...,
            request_checksum_calculation: Checksums = ...,
            response_checksum_validation: Checksums = ...,
            aiobotocore_config: AioConfig | None = ...,
            capabilities: Capabilities | None = ...,
        ) -> None: ...

    @field_validator("endpoint_url", "presign_endpoint_url")
    @classmethod
    def _no_credentials(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if "@" in url:
            message = (
                "must not contain credentials; use aws_access_key_id and aws_secret_access_key"
            )
            raise ValueError(message)
        return check_http_url(url)

    @field_validator("aiobotocore_config")
    @classmethod
    def _made_by_botocore(cls, value: object) -> object:
        if value is None:
            return None
        from botocore.config import Config

        if not isinstance(value, Config):
            message = "must be an aiobotocore.config.AioConfig"
            raise ValueError(message)  # noqa: TRY004 - pydantic turns ValueErrors into its own
        return value
