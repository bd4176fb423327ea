"""`fennflow demo`: the main job on an S3 server of its own, a crash, and the recovery from it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen
from xml.etree import ElementTree as ET

import typer

from fennflow import ConfigDict, UnitOfWork
from fennflow.cli.app import FAILED, Json, run, show_json
from fennflow.cli.terminal import stderr, stdout
from fennflow.files import TextContent
from fennflow.repositories import CrudRepository, RepoField

if TYPE_CHECKING:
    from fennflow.testing import Fault, S3Request, S3Server

BUCKET = "letters"
NAMES = ("anna.txt", "bert.txt", "carl.txt")
LEASE_TTL = 1.0
WAITED_FOR = 30.0
KILL = 9
"""SIGKILL. On Windows any number ends the process just as abruptly."""
NOTES = ".fennflow/catalogs/"
"""Where each catalog that uses a bucket leaves a note, which stays."""
XMLNS = "{http://s3.amazonaws.com/doc/2006-03-01/}"

Texts = dict[str, str]


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(demo)


def demo(*, as_json: Json = False) -> None:
    """Start an S3 server, run the main job, kill a process while it commits, and recover.

    It needs no account and no network, and leaves nothing behind.
    """
    try:
        from fennflow.testing import strict_s3_server

        unit_of_work("http://127.0.0.1", Path())  # fails if a package is missing
    except ImportError as error:
        stderr.message(f"{error}\nThe demo needs: pip install 'fennflow[demo]>=1.0'")
        raise typer.Exit(FAILED) from error
    with (
        strict_s3_server() as server,
        tempfile.TemporaryDirectory(prefix="fennflow-demo-") as directory,
    ):
        _http("PUT", f"{server.url}/{BUCKET}")
        story = run(_Demo(server, Path(directory), quiet=as_json).narrate())
    if as_json:
        show_json(story)


def unit_of_work(url: str, directory: Path) -> type[Any]:
    """Return the unit of work that the demo and the process that it kills share.

    Raises:
        ImportError: the connector or the backend is not installed.
    """
    from fennflow.backends import SqlalchemyBackendConfig
    from fennflow.connectors import S3ConnectorConfig

    class UOW(UnitOfWork):
        letters = RepoField(CrudRepository, namespace=BUCKET)
        config = ConfigDict(
            connector=S3ConnectorConfig(
                endpoint_url=url,
                region_name="us-east-1",
                aws_access_key_id="demo",
                aws_secret_access_key="demo",  # noqa: S106 - no secret
            ),
            backend=SqlalchemyBackendConfig(url=f"sqlite:///{directory}/catalog.db"),
            lease_ttl=LEASE_TTL,
            recovery_interval=3600.0,  # no background recovery before the demo shows it
        )

    return UOW


async def write(uow_class: type[Any], text: str) -> None:
    """Write every letter, in one transaction: the work of the process that is killed."""
    async with uow_class() as uow:
        await uow.letters.put(*(TextContent.from_content(text, filename=name) for name in NAMES))


class _Demo:
    """The demonstration on standard output.

    Args:
        server: where the bucket is.
        directory: where the catalog is.
        quiet: whether to print nothing and only return the facts.
    """

    def __init__(self, server: S3Server, directory: Path, *, quiet: bool) -> None:
        self._server = server
        self._directory = directory
        self._quiet = quiet
        self._uow = unit_of_work(server.url, directory)

    async def narrate(self) -> dict[str, Texts]:
        """Run it all, and return what was seen at each step."""
        story: dict[str, Texts] = {}
        self._say(
            "An S3 server in this process",
            f"It listens on {self._server.url}, keeps its objects in memory, and has the bucket "
            f"{BUCKET!r}. The catalog is a SQLite file in {self._directory}.",
        )
        async with self._uow.lifespan():
            self._say(
                "One unit of work writes three letters",
                "async with UOW() as uow: await uow.letters.put(anna, bert, carl)",
            )
            await write(self._uow, "first version")
            story["committed"] = self._show(
                "the bucket, as any S3 client sees it", await self._raw()
            )

            self._say(
                "An exception inside the block",
                "The next one overwrites all three, then it raises: no reader sees a change.",
            )
            try:
                async with self._uow() as uow:
                    changed = [TextContent.from_content("oops", filename=name) for name in NAMES]
                    await uow.letters.put(*changed)
                    raise LookupError  # noqa: TRY301 - that is the point
            except LookupError:
                story["after_exception"] = self._show("the bucket", await self._raw())

            self._say(
                "A process is killed before it commits",
                "It overwrites all three, and dies (SIGKILL) while it sends the second one.",
            )
            await self._killed("PUT", 2, "never visible")
            story["killed_before_commit"] = self._show("the bucket", await self._raw())
            report = await self._recovered()
            self._say(
                "Recovery finds what it left",
                f"UOW.recover() undid {report.compensated} transaction: its bytes were next to the "
                "letters, under .fennflow/, and are deleted.",
            )
            story["compensated"] = self._show("the bucket", await self._raw())

            self._say(
                "A process is killed while it commits",
                "All three were sent and the catalog says 'committed', in one transaction. It dies "
                "while the bytes are copied to their places: one is there, two are not.",
            )
            await self._killed("COPY", 2, "second version")
            story["killed_while_committing"] = self._show("the bucket", await self._raw())
            story["read_meanwhile"] = self._show(
                "the same moment through FennFlow, which knows where the bytes are",
                await self._read(),
            )
            report = await self._recovered()
            self._say(
                "Recovery finishes what was decided",
                f"UOW.recover() rolled {report.rolled_forward} transaction forward. No program has to "
                "call it: the next program that uses the unit of work does, and a running one at "
                "intervals.",
            )
            story["rolled_forward"] = self._show("the bucket", await self._raw())
        if not self._quiet:
            stdout.line()
            stdout.line(
                "All or nothing, whenever the process dies. Next: the quick start in the README."
            )
        return story

    async def _killed(self, operation: str, number: int, text: str) -> None:
        """Let a process write the letters, and kill it at its n-th request of a kind."""
        from fennflow.testing import Fault

        arguments = json.dumps([self._server.url, str(self._directory), text])
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", __name__, arguments)
        counted = threading.Lock()  # the server has a thread for each connection
        left = number

        def kill(request: S3Request) -> Fault | None:
            nonlocal left
            if request.operation != operation or request.key.startswith(".fennflow/probe"):
                return None
            with counted:
                left -= 1
                if left > 0:
                    return None
                if left == 0:
                    os.kill(process.pid, KILL)
            return Fault.BEFORE

        with self._server.failing(kill):
            await process.wait()

    async def _recovered(self) -> Any:
        """Recover as soon as the lease of the dead process has run out."""
        deadline = asyncio.get_running_loop().time() + WAITED_FOR
        while True:
            report = await self._uow.recover()
            if report.compensated or report.rolled_forward:
                return report
            if asyncio.get_running_loop().time() > deadline:
                message = "The process that was killed left nothing to recover."
                raise TimeoutError(message)
            await asyncio.sleep(0.1)

    async def _read(self) -> Texts:
        async with self._uow() as uow:
            return {str(file.path): file.content for file in await uow.letters.get(*NAMES)}

    async def _raw(self) -> Texts:
        return await asyncio.to_thread(self._listed)

    def _listed(self) -> Texts:
        listed = ET.fromstring(_http("GET", f"{self._server.url}/{BUCKET}?list-type=2"))  # noqa: S314 - of our server
        keys = [str(key.text) for key in listed.iter(f"{XMLNS}Key")]
        return {
            key: _http("GET", f"{self._server.url}/{BUCKET}/{key}").decode()
            for key in keys
            if not key.startswith(NOTES)
        }

    def _say(self, title: str, text: str) -> None:
        if not self._quiet:
            stdout.line()
            stdout.line(title, style="bold")
            stdout.line(text, wrap=True)

    def _show(self, what: str, texts: Texts) -> Texts:
        if not self._quiet:
            stdout.line(f"  {what}:", style="dim")
            for key, text in texts.items():
                stdout.line(f"    {_shortened(key)}: {text}")
        return texts


def _shortened(key: str) -> str:
    """Shorten a key under the reserved prefix to a readable length."""
    first, *others = key.split("/")
    return f"{first}/…/{others[-1]}" if others else key


def _http(method: str, url: str) -> bytes:
    with urlopen(Request(url, method=method), timeout=WAITED_FOR) as answer:  # noqa: S310 - of our server
        body: bytes = answer.read()
        return body


def main(arguments: Sequence[str]) -> None:
    """Be the process that is killed."""
    url, directory, text = json.loads(arguments[0])
    asyncio.run(write(unit_of_work(url, Path(directory)), text))


if __name__ == "__main__":
    main(sys.argv[1:])
