"""Azurite, a server of Azure Blob Storage; `nox` installs it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from email.utils import formatdate
from http.client import HTTPConnection
from pathlib import Path

from fennflow.connectors import ObstoreConnectorConfig
from fennflow.testing.processes import free_ports, running
from stores import numbers

ACCOUNT = "tester"
KEY = base64.b64encode(b"no secret").decode()


def request(port: int, method: str, target: str, extra: Mapping[str, str] | None = None) -> int:
    """Send a request that is signed with the shared key of the account, with headers of Azure."""
    signed = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02", **(extra or {})}
    canonical = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    path, _, query = target.partition("?")
    parameters = "".join(f"\n{each.replace('=', ':')}" for each in sorted(query.split("&")) if each)
    text = f"{method}\n\n\n\n\n\n\n\n\n\n\n\n{canonical}/{ACCOUNT}{path}{parameters}"
    signature = hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)
    headers = {
        **signed,
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}",
        "Content-Length": "0",
    }
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, target, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def azurite_server(folder: Path) -> Generator[int]:
    """Run Azurite, and return its port."""
    [port] = free_ports(1)
    command = [os.environ["FENNFLOW_AZURITE"], "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--location", str(folder), "--silent", "--disableTelemetry"]
    # Azurite and obstore follow the API's versions at a pace of their own.
    command += ["--skipApiVersionCheck"]

    def ready() -> None:
        request(port, "GET", f"/{ACCOUNT}?comp=list")

    with running(command, ready, env={"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}):
        yield port


def new_container(port: int) -> tuple[ObstoreConnectorConfig, str]:
    """Make a container, and return it with a config for it."""
    container = f"container-{next(numbers)}"
    assert request(port, "PUT", f"/{ACCOUNT}/{container}?restype=container") == 201
    options = {
        "account_name": ACCOUNT,
        "account_key": KEY,
        "endpoint": f"http://127.0.0.1:{port}/{ACCOUNT}",
    }
    return ObstoreConnectorConfig(url="az://", options=options), container
