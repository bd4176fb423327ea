"""The program `fennflow`, run as users run it, next to a module of theirs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from crashing import Site, make_site, start
from fennflow import plugins
from fennflow.cli import main
from fennflow.cli.target import load
from fennflow.files import TextContent
from fennflow.testing import S3Server

PROGRAM = Path(sys.executable).with_name("fennflow")
MODULE = """
from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import S3ConnectorConfig
from fennflow.repositories import CrudRepository, S3RepoField


class UOW(UnitOfWork):
    files = S3RepoField(CrudRepository, bucket_name={bucket!r})
    config = ConfigDict(
        connector=S3ConnectorConfig(),
        backend=SqlalchemyBackendConfig(url={url!r}),
        lock_timeout=0.2,
    )


class Holder:
    UOW = UOW


nothing = 1
"""


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


LOCAL_MODULE = """
from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import ObstoreConnectorConfig
from fennflow.repositories import CrudRepository, RepoField


class UOW(UnitOfWork):
    files = RepoField(CrudRepository, namespace="bucket")
    config = ConfigDict(
        connector=ObstoreConnectorConfig(url="memory:///{name}"),
        backend=SqlalchemyBackendConfig(url="sqlite:///{directory}/catalog.db"),
        reconcile={{"frequency": "never"}},
    )
"""


class Program:
    """The program, run in this process: its store is in memory, its catalog in a SQLite file."""

    def __init__(
        self,
        directory: Path,
        module: str,
        monkeypatch: pytest.MonkeyPatch,
        capture: pytest.CaptureFixture[bytes],
    ) -> None:
        self.directory = directory
        self.target = f"{module}:UOW"
        self._patch = monkeypatch
        self._capture = capture
        source = LOCAL_MODULE.format(name=module, directory=directory)
        (directory / f"{module}.py").write_text(source)

    def __call__(self, command: str, *arguments: str, target: bool = True) -> Done:
        named = [self.target] if target else []
        self._patch.setattr(sys, "argv", ["fennflow", command, *named, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        sys.stdout.flush()
        out, err = self._capture.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, out.decode(), err.decode())

    def put(self, files: Mapping[str, str]) -> None:
        """Put files into the store, by path and text."""
        contents = [
            TextContent.from_content(text, filename=path, media_type="text/plain")
            for path, text in files.items()
        ]

        async def work() -> None:
            uow_class: Any = load(self.target)
            async with uow_class() as uow:
                await uow.files.put(*contents)

        asyncio.run(work())

    def contents(self) -> dict[str, str]:
        """Return the files of the store, by path and text."""
        return {path: self("cat", f"files:{path}").out for path in self.files()}

    def files(self) -> list[str]:
        """Return the paths of all files in the store."""
        rows = self("ls", "-r", "files:", "--json").json
        return [row["path"] for row in rows]


def run_program(
    directory: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    outputs: Sequence[Path],
    pipe: Connection,
) -> None:
    """Run the program in this process, whose standard output and error are these files."""
    pipe.close()
    for descriptor, path in enumerate(outputs, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("error")
    plugins._current = None  # the variables say which are used
    sys.argv = ["fennflow", *arguments]
    main()


@dataclass
class Shell:
    """A working directory with a module `app`, and the environment that reaches its store.

    A command is a process of its own, which is forked from one that has imported what is large.
    """

    directory: Path
    environment: dict[str, str]
    site: Site

    async def __call__(self, *arguments: str, **environment: str) -> Done:
        return await asyncio.to_thread(self._run, arguments, {**self.environment, **environment})

    def _run(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Done:
        with tempfile.TemporaryDirectory() as outputs:
            out, err = Path(outputs, "out"), Path(outputs, "err")
            process, pipe = start(run_program, self.directory, arguments, environment, (out, err))
            pipe.close()
            process.join()
            assert process.exitcode is not None
            return Done(process.exitcode, out.read_text(), err.read_text())


async def make_shell(request: pytest.FixtureRequest, moto: S3Server, tmp_path: Path) -> Shell:
    site = await make_site("moto", "sqlite", request)
    url = site.backend.url.get_secret_value()
    (tmp_path / "app.py").write_text(MODULE.format(bucket=site.namespace, url=url))
    environment = {
        "PATH": os.environ["PATH"],
        "AWS_ENDPOINT_URL": moto.url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": moto.access_key,
        "AWS_SECRET_ACCESS_KEY": moto.secret_key,
        "COLUMNS": "120",
    }
    return Shell(tmp_path, environment, site)
