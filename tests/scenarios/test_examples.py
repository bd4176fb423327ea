"""The examples run as in the README, without a warning."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from browser import browser, find_browser
from fennflow.testing import PostgresqlServer, S3Server
from fennflow.testing.processes import READY_WITHIN, free_ports
from stores import new_bucket, raw_client

ADMIN = """
import django

django.setup()
from django.contrib.auth import get_user_model
from django.core.files.storage import default_storage
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client

from django_postbox.models import Letter

get_user_model().objects.create_superuser("ann", password="secret")
client = Client(SERVER_NAME="localhost")
client.login(username="ann", password="secret")


def send(page, name="", **data):
    if name:
        data["scan"] = SimpleUploadedFile(name, name.encode())
    answer = client.post(f"/admin/django_postbox/letter/{page}/", data)
    with default_storage.unit_of_work() as uow:
        print(answer.status_code, *uow.files.list())


send("add", "a.txt", title="first")
send("add", "b.txt", title="first")
[letter] = Letter.objects.all()
send(f"{letter.pk}/change", "c.txt", title="second")
print(*client.get("/media/scans/c.txt").streaming_content)
send(f"{letter.pk}/change", title="second", **{"scan-clear": "on"})
send(f"{letter.pk}/change", "d.txt", title="second")
send(f"{letter.pk}/delete", post="yes")
"""
LETTERS = """
import time

import django

django.setup()
from django.core.files.storage import default_storage
from django_postbox.models import Letter

uow = default_storage.unit_of_work
deadline = time.monotonic() + 200
while uow.transactions():
    assert time.monotonic() < deadline, uow.transactions()
    uow.recover()
    time.sleep(0.1)
for letter in Letter.objects.all():
    with letter.scan.open() as file:
        assert file.read().decode() == letter.title, letter.title
print(*Letter.objects.values_list("scan", flat=True))
"""
ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "direct-uploads.md"
BROWSER = find_browser()
pytestmark = pytest.mark.once


@contextmanager
def served(
    app: str, server: S3Server, bucket: str, database: str, *, port: int | None = None
) -> Generator[httpx.Client]:
    """Run an example as a program, as its users do."""
    port = port or free_ports(1)[0]
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-m", "uvicorn", "--app-dir", "examples"),
            *("--port", str(port), "--log-level", "warning", f"{app}:app"),
        ],
        cwd=ROOT,
        env=os.environ
        | {
            "DATABASE_URL": database,
            "BUCKET": bucket,
            "AWS_ENDPOINT_URL": server.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + READY_WITHIN
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            while True:
                try:
                    client.get("/letters/0")
                    break
                except httpx.ConnectError:
                    assert process.poll() is None, process.communicate()[1]
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert errors == ""


@pytest.mark.parametrize("app", ["fastapi_app", "litestar_app"])
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_the_web_examples_store_letters_with_their_files(
    app: str, kind: str, moto: S3Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    database = f"sqlite:///{tmp_path}/letters.db"
    if kind == "postgresql":
        server: PostgresqlServer = request.getfixturevalue("postgresql")
        database = server.new_database()
    bucket = await new_bucket(moto)
    async with raw_client(moto) as raw:
        await raw.put_object(Bucket=bucket, Key="older.txt", Body=b"of another program")
    first = ("a.txt", b"one", "text/plain")
    with served(app, moto, bucket, database) as client:
        both = [("files", first), ("files", ("b.bin", b"two", "application/octet-stream"))]
        answer = client.post("/letters", data={"title": "Dear Ann"}, files=both)
        assert (answer.status_code, answer.json()) == (
            201,
            {"id": 1, "attachments": ["a.txt", "b.bin"]},
        )
        stored = {"id": 1, "title": "Dear Ann", "attachments": ["a.txt", "b.bin"]}
        assert client.get("/letters/1").json() == stored
        # Two files of one name: the row goes, too.
        twice = [("files", first), ("files", first)]
        answer = client.post("/letters", data={"title": "Dear Bob"}, files=twice)
        assert answer.status_code == 400
        assert "named" in answer.json()["detail"]
        answer = client.put("/letters/1", data={"title": "Dear Bob"}, files=twice)
        assert answer.status_code == 400
        assert client.get("/letters/1").json() == stored
        assert client.get("/letters/2").status_code == 404
        new = [("files", ("a.txt", b"new", "text/plain"))]
        assert client.put("/letters/1", data={"title": "Dear Cleo"}, files=new).is_success
        answer = client.get("/letters/1/a.txt")
        assert answer.content == b"new"
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get("/letters/1/c.txt").status_code == 404
        again = {"If-None-Match": answer.headers["etag"]}
        assert client.get("/letters/1/a.txt", headers=again).status_code == 304
        part = client.get("/letters/1/a.txt", headers={"Range": "bytes=1-"})
        assert (part.status_code, part.content) == (206, b"ew")
        assert part.headers["content-range"] == "bytes 1-2/3"
        assert client.get("/letters/1/a.txt", headers={"Range": "bytes=9-"}).status_code == 416
        head = client.head("/letters/1/a.txt")
        assert (head.content, head.headers["content-length"]) == (b"", "3")
        upload = client.post("/letters/1/large.bin/upload-url").json()
        async with httpx.AsyncClient(headers=upload["headers"]) as browser:
            sent = await browser.put(upload["url"], content=b"straight to the bucket")
            assert sent.is_success
        assert client.post("/letters/1/a.txt/upload-url").status_code == 409
    with served(app, moto, bucket, database) as client:
        assert client.get("/letters/1").json() == stored | {"title": "Dear Cleo"}


class DjangoExample:
    """The Django example, on a new database and a new bucket.

    Args:
        server: that has the bucket.
        bucket: for its files.
        folder: for its settings and its database.
        lease_ttl: seconds until the transactions of a killed worker are recovered.
    """

    def __init__(
        self, server: S3Server, bucket: str, folder: Path, lease_ttl: float = 60.0
    ) -> None:
        short = f'STORAGES["default"]["OPTIONS"]["lease_ttl"] = {lease_ttl}\n'
        # On a busy machine a worker must not give up waiting for another one.
        patient = 'DATABASES["default"]["OPTIONS"]["timeout"] = 100\n'
        (folder / "short.py").write_text(f"from django_postbox.settings import *\n{short}{patient}")
        self.folder = folder
        self.env = os.environ | {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
            "BUCKET": bucket,
            "DJANGO_SETTINGS_MODULE": "short",
            "PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{folder}",
        }

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", *command],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def served(self) -> Generator[tuple[str, int]]:
        """Serve it by several workers; return its URL and the id of the process above them."""
        [port] = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        command = ["gunicorn", "--workers", "3", "--bind", f"127.0.0.1:{port}", "--timeout", "300"]
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "django_postbox.wsgi"], cwd=self.folder, env=self.env
        )
        try:
            deadline = time.monotonic() + READY_WITHIN
            while True:
                try:
                    httpx.get(url, timeout=30)
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(timeout=60)

    def upload(self, url: str, title: str) -> int:
        """Send the form, and return the status; 0 if the worker was killed."""
        try:
            with httpx.Client(base_url=url, timeout=300) as client:
                client.get("/")
                form = {"title": title, "csrfmiddlewaretoken": client.cookies["csrftoken"]}
                scan = (title, title.encode())
                return client.post("/", data=form, files={"scan": scan}).status_code
        except httpx.TransportError:
            return 0


def kill_child(parent: int) -> None:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


async def test_files_follow_their_rows_in_the_admin_of_the_django_example(
    moto: S3Server, tmp_path: Path
) -> None:
    example = DjangoExample(moto, await new_bucket(moto), tmp_path)
    await asyncio.to_thread(example.run, "-m", "django", "migrate")
    assert (await asyncio.to_thread(example.run, "-c", ADMIN)).splitlines() == [
        "302 scans/a.txt",
        "200 scans/a.txt",  # the title is taken
        "302 scans/c.txt",
        "b'c.txt'",
        "302",
        "302 scans/d.txt",
        "302",
    ]


@pytest.mark.crashes
@pytest.mark.skipif(sys.platform != "linux", reason="it looks for children below /proc")
@pytest.mark.timeout(900)
async def test_the_django_example_splits_nothing_though_workers_are_killed(
    moto: S3Server, tmp_path: Path
) -> None:
    bucket = await new_bucket(moto)
    example = DjangoExample(moto, bucket, tmp_path, lease_ttl=5.0)
    await asyncio.to_thread(example.run, "-m", "django", "migrate")
    titles = [f"letter{number}" for number in range(24)]
    with example.served() as (url, parent), ThreadPoolExecutor(6) as threads:
        sent = {title: threads.submit(example.upload, url, title) for title in titles}
        for title in titles[:18:6]:
            await asyncio.wrap_future(sent[title])
            kill_child(parent)
        statuses = {title: await asyncio.wrap_future(each) for title, each in sent.items()}
    rows = set((await asyncio.to_thread(example.run, "-c", LETTERS)).split())
    stored = {f"scans/{title}" for title, status in statuses.items() if status == 302}
    assert stored <= rows
    assert len(stored) > 6
    async with raw_client(moto) as raw:
        listed = (await raw.list_objects_v2(Bucket=bucket))["Contents"]
    keys = {item.get("Key", "") for item in listed}
    assert {key for key in keys if not key.startswith(".fennflow/catalogs/")} == rows


def test_the_quickstart_shows_objects_and_an_untouched_bucket() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "default", "examples/quickstart.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("folder1/numbers.json: JsonContent [1, 2, 3]") == 2
    assert "inside: ['hello.txt', 'new.txt', 'raw.txt']" in done.stdout
    untouched = done.stdout.partition("is untouched:")[2]
    assert untouched.split("\n")[1:4] == [
        "  folder1/hello.txt: b'Hello, world!'",
        "  folder1/numbers.json: b'[1,2,3]'",
        "  folder1/raw.txt: b'some bytes'",
    ]


def test_the_main_job_runs_in_memory() -> None:
    """On S3 servers it runs in tests/packaging and tests/docs."""
    found = re.search(
        r"## The main job.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert found is not None
    program = found[1].replace("S3ConnectorConfig", "InMemoryConnectorConfig")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    paths, files = done.stdout.splitlines()
    assert paths.count("folder1/") == 3
    assert {"BinaryContent", "JsonContent", "TextContent"} == set(re.findall(r"\w+Content", files))


async def new_page_bucket(server: S3Server, port: int) -> str:
    """Return a bucket with the CORS rules of the guide, for a page of this machine."""
    [rules] = re.findall(r"```json\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    rules = rules.replace("https://www.example.com", f"http://127.0.0.1:{port}")
    bucket = await new_bucket(server)
    async with raw_client(server) as raw:
        await raw.put_bucket_cors(Bucket=bucket, CORSConfiguration=json.loads(rules))
    return bucket


async def test_the_upload_example_commits_uploads_with_their_rows(
    seaweedfs: S3Server, tmp_path: Path
) -> None:
    [port] = free_ports(1)
    bucket = await new_page_bucket(seaweedfs, port)
    origin = {"Origin": f"http://127.0.0.1:{port}"}
    database = f"sqlite:///{tmp_path}/videos.db"
    with served("direct_upload", seaweedfs, bucket, database, port=port) as client:
        wanted = {"size": 3, "media_type": "video/mp4"}
        ticket = client.post("/tickets", json=wanted).json()
        asked = {
            "Access-Control-Request-Method": "PUT",
            "Access-Control-Request-Headers": ",".join(sorted(map(str.lower, ticket["headers"]))),
        }
        preflight = client.options(ticket["url"], headers={**origin, **asked})
        assert preflight.status_code == 200
        assert preflight.headers["Access-Control-Allow-Origin"] in {"*", origin["Origin"]}
        early = client.post("/videos", json={"token": ticket["token"], "title": "early"})
        assert (early.status_code, "Nothing was uploaded" in early.text) == (400, True)
        for body, status in ((b"more", 403), (b"one", 200), (b"two", 412)):
            answer = client.put(
                ticket["url"], content=body, headers={**ticket["headers"], **origin}
            )
            assert answer.status_code == status
        uploaded = {"token": ticket["token"], "title": "Holidays.mp4"}
        assert client.post("/videos", json=uploaded).status_code == 201
        assert client.post("/videos", json=uploaded).status_code == 400
        forged = {"token": f"{ticket['token']}x", "title": "x"}
        assert client.post("/videos", json=forged).status_code == 400
        [video] = client.get("/videos").json()
        assert (video["title"], video["size"]) == ("Holidays.mp4", 3)
        found = client.get(f"/videos/{video['id']}", follow_redirects=True)
        assert (found.content, found.headers["Content-Type"]) == (b"one", "video/mp4")
        assert "Holidays.mp4" in found.headers["Content-Disposition"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
async def test_the_page_uploads_in_a_browser(seaweedfs: S3Server, tmp_path: Path) -> None:
    """Small files by one PUT, and large ones in parts."""
    assert BROWSER is not None
    [port] = free_ports(1)
    bucket = await new_page_bucket(seaweedfs, port)
    small, large = tmp_path / "small.txt", tmp_path / "large.bin"
    small.write_bytes(b"Dear Ann")
    large.write_bytes(bytes(range(256)) * (17 << 12))
    database = f"sqlite:///{tmp_path}/videos.db"
    with (
        served("direct_upload", seaweedfs, bucket, database, port=port) as client,
        browser(BROWSER, tmp_path / "profile") as page,
    ):

        def use() -> None:
            page.open(f"http://127.0.0.1:{port}/")
            for number, each in enumerate((small, large), 1):
                page.choose("input", each)
                page.evaluate("document.querySelector('form').requestSubmit()")
                page.wait_for(
                    f"document.querySelectorAll('li').length === {number} || "
                    "state.textContent.startsWith('Failed')"
                )
                page.wait_for("!state.textContent.startsWith('Uploading')")
                assert page.evaluate("state.textContent") == "Done."

        await asyncio.to_thread(use)
        for video in client.get("/videos").json():
            content = client.get(f"/videos/{video['id']}", follow_redirects=True).content
            assert content == (tmp_path / video["title"]).read_bytes()
