"""The page on Django leads from `startproject` to uploads that a kill does not split."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fennflow.testing import S3Server
from stores import new_bucket, raw_client

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/django.md").read_text()
FILES = re.compile(
    r"^```(?:python|html)\n(?:# |<!-- )((?:mysite|letters)/\S+)(?: -->)?\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

UPLOAD = """
import sys

import django

django.setup()
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client

from fennflow.testing import boundaries, killing

at, title = int(sys.argv[1]), sys.argv[2]
count, kill = 0, killing(at=at)


def reached(boundary):
    global count
    count += 1
    kill(boundary)


client = Client(SERVER_NAME="localhost")
scan = SimpleUploadedFile(title, title.encode())
with boundaries(reached):
    response = client.post("/", {"title": title, "scan": scan})
assert response.status_code == 302, response.status_code
print(count)
"""
LOOK = """
import time

import django

django.setup()
from django.core.files.storage import default_storage
from letters.models import Letter

uow = default_storage.unit_of_work
for _ in range(100):
    if not uow.transactions():
        break
    uow.recover()
    time.sleep(0.1)
for letter in Letter.objects.all():
    with letter.scan.open() as file:
        assert file.read().decode() == letter.title, letter.title
print(*sorted(Letter.objects.values_list("scan", flat=True)))
"""


@dataclass(frozen=True)
class Project:
    """A project as the page makes it."""

    folder: Path
    server: S3Server
    bucket: str

    def run(self, *command: str, fails: bool = False) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", *command],
            cwd=self.folder,
            env=os.environ
            | {
                "AWS_ENDPOINT_URL": self.server.url,
                "AWS_ACCESS_KEY_ID": self.server.access_key,
                "AWS_SECRET_ACCESS_KEY": self.server.secret_key,
                "AWS_DEFAULT_REGION": "us-east-1",
                "DJANGO_SETTINGS_MODULE": "mysite.settings",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if not fails:
            assert done.returncode == 0, done.stderr
        return done.stdout

    def upload(self, title: str, at: int = -1) -> str:
        return self.run("-c", UPLOAD, str(at), title, fails=at >= 0).strip()

    def names(self) -> set[str]:
        """Check that rows, catalog and bucket agree; return which files there are."""
        rows = set(self.run("-c", LOOK).split())
        assert asyncio.run(self.objects()) == rows
        return rows

    async def objects(self) -> set[str]:
        async with raw_client(self.server) as client:
            listed = await client.list_objects_v2(Bucket=self.bucket)
        names = [item.get("Key", "") for item in listed.get("Contents", [])]
        return {name for name in names if not name.startswith(".fennflow/catalogs/")}


@pytest.fixture
def project(moto: S3Server, tmp_path: Path) -> Project:
    project = Project(tmp_path, moto, asyncio.run(new_bucket(moto)))
    project.run("-m", "django", "startproject", "mysite", ".")
    project.run("manage.py", "startapp", "letters")
    written: list[str] = []
    for name, given in FILES.findall(PAGE):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        code = given
        if path.name == "settings.py":
            # A test does not wait for a minute until a lease has run out.
            code = given.replace('"my_files"', f'"{project.bucket}"')
            code = code.replace('"base_url"', '"lease_ttl": 1.0, "base_url"')
            code = path.read_text() + code
        path.write_text(code)
        written.append(name)
    assert len(written) == 7
    project.run("manage.py", "makemigrations", "letters")
    project.run("manage.py", "migrate")
    return project


@pytest.mark.docs
def test_the_page_leads_to_an_upload_form(project: Project) -> None:
    assert project.run("manage.py", "makemigrations", "--check", "--dry-run")
    project.upload("first")
    assert project.names() == {"scans/first"}
    project.run("manage.py", "shell", "-c", "import letters.reports as r; r.write_report()")
    assert asyncio.run(project.objects()) == {"scans/first", "report.json"}
    assert "problems=()" in project.run("manage.py", "fennflow", "doctor")


@pytest.mark.crashes
@pytest.mark.timeout(1800)
def test_a_kill_leaves_row_and_file_or_neither(project: Project) -> None:
    project.upload("first")  # which also does what is done once
    total = int(project.upload("whole"))
    assert total > 10
    points = range(0, total, max(1, total // 7))
    # How many boundaries there are differs a little: an upload that ended had not reached its own.
    ended = [project.upload(f"at{at}", at) != "" for at in points]
    assert ended.count(False) > 3
    names = project.names()
    assert names >= {"scans/first", "scans/whole"}
    kept = [f"scans/at{at}" in names for at in points]
    assert kept == sorted(kept)  # from the commit on, all are kept
    assert not kept[0]
    assert all(is_kept for is_kept, has_ended in zip(kept, ended, strict=True) if has_ended)
