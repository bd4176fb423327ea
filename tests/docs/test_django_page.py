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
deadline = time.monotonic() + 200
while uow.transactions():
    assert time.monotonic() < deadline, uow.transactions()
    uow.recover()
    time.sleep(0.1)
for letter in Letter.objects.all():
    with letter.scan.open() as file:
        assert file.read().decode() == letter.title, letter.title
print(*sorted(Letter.objects.values_list("scan", flat=True)))
"""

COMPARED = """
import os
import sys
import time
import traceback

import boto3
import django
from django.conf import settings

kind, bucket, folder = sys.argv[1:]
apps = {
    "django-storages": [],
    "django-cleanup": ["django_cleanup.apps.CleanupConfig"],
    "fennflow-django": ["fennflow_django"],
}
storage = {"BACKEND": "storages.backends.s3.S3Storage", "OPTIONS": {"bucket_name": bucket}}
if kind == "fennflow-django":
    from fennflow.connectors import S3ConnectorConfig

    options = {"connector": S3ConnectorConfig(), "namespace": bucket, "lease_ttl": 5.0}
    storage = {"BACKEND": "fennflow_django.FennFlowStorage", "OPTIONS": options}
database = {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{folder}/{kind}.db"}
database["OPTIONS"] = {"transaction_mode": "IMMEDIATE"}
settings.configure(
    DATABASES={"default": database},
    INSTALLED_APPS=["django_letters", *apps[kind]],
    STORAGES={"default": storage},
    USE_TZ=True,
)
django.setup()
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.core.management import call_command
from django.db import connection, transaction
from django_letters.models import Letter


def save(title):
    letter = Letter(title=title)
    letter.scan.save(title, ContentFile(b"1"))
    return letter


def rolled_back(act):
    with transaction.atomic():
        act()
        transaction.set_rollback(True)


def killed(act):
    # It is forked before this process has begun any thread.
    connection.close()
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def killed_before_the_commit():
    with transaction.atomic():
        save("2")
        os._exit(0)


def killed_after_the_commit():
    replaced = save("3")
    commit = connection._commit
    with transaction.atomic():
        replaced.scan.save("new", ContentFile(b"2"))
        connection._commit = lambda: (commit(), os._exit(0))


call_command("migrate", run_syncdb=True, verbosity=0)
killed(killed_before_the_commit)
killed(killed_after_the_commit)
rolled_back(lambda: save("1"))
deleted = save("4")
rolled_back(deleted.delete)
first = save("5")
Letter.objects.create(title="twin", scan=first.scan.name)
first.delete()
if kind == "fennflow-django":
    uow = default_storage.unit_of_work
    deadline = time.monotonic() + 200
    while uow.transactions():
        assert time.monotonic() < deadline, uow.transactions()
        uow.recover()
        time.sleep(0.1)
listed = boto3.client("s3").list_objects_v2(Bucket=bucket)["Contents"]
print(*(item["Key"].removeprefix("scans/") for item in listed))
"""


@dataclass(frozen=True)
class Project:
    """A project as the page makes it."""

    folder: Path
    server: S3Server
    bucket: str

    def run(self, *command: str, fails: bool = False, **env: str) -> str:
        warnings = () if "PYTHONWARNINGS" in env else ("-W", "error")
        done = subprocess.run(
            [sys.executable, *warnings, *command],
            cwd=self.folder,
            env=os.environ
            | {
                "AWS_ENDPOINT_URL": self.server.url,
                "AWS_ACCESS_KEY_ID": self.server.access_key,
                "AWS_SECRET_ACCESS_KEY": self.server.secret_key,
                "AWS_DEFAULT_REGION": "us-east-1",
                "DJANGO_SETTINGS_MODULE": "mysite.settings",
                **env,
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
            code = given.replace('"my-files"', f'"{project.bucket}"')
            code = code.replace('"base_url"', '"lease_ttl": 5.0, "base_url"')
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


@pytest.mark.docs
@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
@pytest.mark.timeout(600)
def test_the_table_says_what_happens_to_files(moto: S3Server, tmp_path: Path) -> None:
    table = PAGE.partition("## Side by side")[2]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    cells = list(zip(*([each.strip() for each in row] for row in rows[2:]), strict=True))
    assert len(cells[0]) == 5
    kinds = ("django-storages", "django-cleanup", "fennflow-django")
    for kind, column in zip(kinds, cells[1:], strict=True):
        project = Project(tmp_path, moto, asyncio.run(new_bucket(moto)))
        left = project.run(
            *("-c", COMPARED, kind, project.bucket, str(tmp_path)),
            PYTHONPATH=str(ROOT / "tests/support"),
            PYTHONWARNINGS="default",  # of others
        )
        for number, cell in enumerate(column, 1):
            assert not cell or ("stays" in cell) == (str(number) in left.split()), (kind, number)


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
