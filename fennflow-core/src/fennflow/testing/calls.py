"""HTTP requests and responses of test servers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from fennflow.testing.s3_objects import S3Error


class Answer(NamedTuple):
    """An HTTP response."""

    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = {}
    body: bytes = b""


def refusal(error: S3Error) -> Answer:
    """Return an error response."""
    return Answer(error.status, {"Content-Type": "application/xml"}, error_body(error.code))


def error_body(code: str) -> bytes:
    """Return the XML of an error."""
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed request.

    Args:
        method: of HTTP.
        target: path and query as sent.
        headers: names in lower case.
        body: the bytes.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def bucket(self) -> str:
        """Empty for requests without a bucket."""
        return self._path.partition("/")[0]

    @property
    def key(self) -> str:
        """Empty for requests on a bucket."""
        return self._path.partition("/")[2]

    @property
    def query(self) -> dict[str, str]:
        """The part after the `?`."""
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def _path(self) -> str:
        return unquote(self.target.partition("?")[0]).removeprefix("/")
