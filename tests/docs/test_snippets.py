"""Every Python snippet of README, docs and docstrings runs, and prints what its `#>` lines say."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from fennflow.testing import S3Server
from stores import raw_client

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("fennflow-*/README.md")),
    *sorted(ROOT.glob("fennflow-*/src/**/*.py")),
]
FENCE = re.compile(r"^([ \t]*)```(i?)python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# How a notebook runs a cell that awaits.
CELL = """
import ast, asyncio, sys
code = compile(sys.argv[1], "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
asyncio.run(eval(code, {"__name__": "__main__"}))
"""
# What makes the snippet about Celery an application with workers, which are forked after a unit of work.
WORKED = """
import pathlib

for name in ("queue", "control", "results"):
    pathlib.Path(name).mkdir(exist_ok=True)
app.conf.update(
    broker_url="filesystem://",
    broker_transport_options={
        "data_folder_in": "queue", "data_folder_out": "queue", "control_folder": "control"
    },
    result_backend=f"file://{pathlib.Path('results').absolute()}",
)
with UOW() as uow:
    list(uow.reports.list())
"""
# A project of Django's is run by test_django.py.
# What a suite's subclass looks like is not a program: it is run as tests/contract. And tests are run
# by tests/scenarios/test_kit.py.
FRAGMENTS = (
    "class TestMyStore",
    "class TestMyBackend",
    "# test_letters.py",
    "# test_joined.py",
    "# mysite/",
    "# letters/",
)


def snippets() -> Iterator[object]:
    for source in SOURCES:
        text = source.read_text()
        for fence in FENCE.finditer(text):
            code = textwrap.dedent(fence[3])
            if not code.startswith(FRAGMENTS):
                line = text.count("\n", 0, fence.start()) + 1
                program = [CELL, code] if fence[2] else [code]
                yield pytest.param(program, id=f"{source.relative_to(ROOT)}:{line}")


async def provide_bucket(server: S3Server, name: str) -> None:
    """Make a new bucket for the snippets."""
    async with raw_client(server) as client:
        with contextlib.suppress(client.exceptions.NoSuchBucket):
            listed = await client.list_objects_v2(Bucket=name)
            for item in listed.get("Contents", []):
                await client.delete_object(Bucket=name, Key=item.get("Key", ""))
            await client.delete_bucket(Bucket=name)
        await client.create_bucket(Bucket=name)


@pytest.mark.docs
@pytest.mark.parametrize("program", list(snippets()))
def test_a_snippet_runs_as_it_says(program: list[str], moto: S3Server, tmp_path: Path) -> None:
    asyncio.run(provide_bucket(moto, "my_files"))
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", *program],
        cwd=tmp_path,
        env=os.environ
        | {
            "AWS_ENDPOINT_URL": moto.url,
            "AWS_ACCESS_KEY_ID": moto.access_key,
            "AWS_SECRET_ACCESS_KEY": moto.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = re.findall(r"^[ \t]*#> ?(.*)$", program[-1], re.MULTILINE)
    if expected:
        assert done.stdout.splitlines() == expected


@pytest.mark.docs
@pytest.mark.skipif(sys.platform == "win32", reason="Celery forks")
def test_the_task_of_celery_runs_in_workers(tmp_path: Path) -> None:
    page = (ROOT / "docs/sync.md").read_text()
    [code] = [each[3] for each in FENCE.finditer(page) if "from celery import" in each[3]]
    task, eager, _ = code.partition("app.conf.task_always_eager")
    assert eager
    (tmp_path / "reports.py").write_text(task + WORKED)
    options = ["--pool=prefork", "--concurrency=2", "--without-gossip", "--without-mingle"]
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "reports", "worker", *options], cwd=tmp_path
    )
    try:
        asked = "from reports import write_report as w; r = [w.delay(x) for x in 'abcd']; "
        done = subprocess.run(
            [sys.executable, "-c", f"{asked}print(*(each.get(timeout=100) for each in r))"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("a.txt b.txt c.txt d.txt\n", "")
    finally:
        worker.terminate()
        assert worker.wait(timeout=100) == 0
