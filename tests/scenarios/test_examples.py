"""The examples run as the README says, without a warning."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from browser import browser, find_browser
from fennflow.testing import PostgresqlServer, S3Server
from fennflow.testing.processes import READY_WITHIN, free_ports
from stores import new_bucket, raw_client

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "direct-uploads.md"
BROWSER = find_browser()


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


@pytest.mark.once
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
