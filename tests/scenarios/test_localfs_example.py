"""The example of a plugin: links that others put into its directory are not followed, and odd files do not end a listing."""

from __future__ import annotations

import stat
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fennflow.connectors import Location, ObjectAttributes, PutRequest
from fennflow.exceptions import AccessDeniedException, KeyException

SOURCE = Path(__file__).parents[2] / "examples" / "fennflow-localfs" / "src"
TEXT = ObjectAttributes(media_type="text/plain")
ROW = (
    '{{"file": "{}", "etag": "{}", "size": {}, "media_type": "", "metadata": {{}}, '
    '"modified_at": "{}"}}'
)


def connect(root: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Any:
    monkeypatch.syspath_prepend(SOURCE)
    module = import_module("fennflow_localfs.connector")
    return module.LocalFsConnector(module.LocalFsConnectorConfig(root=root, **config))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize("link", ["bucket", "bucket/objects", "bucket/objects/link%"])
async def test_links_are_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(outside)
    connector = connect(root, monkeypatch)
    with pytest.raises(KeyException):
        connector.validate("bucket", "link/y", TEXT)
    with pytest.raises(AccessDeniedException):
        await connector.put(PutRequest("bucket", "link/y", TEXT), b"1")
    with pytest.raises(AccessDeniedException):
        await connector.head("bucket", Location("link/y"))
    assert list(outside.iterdir()) == []


async def test_files_of_others_do_not_end_a_listing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = connect(root, monkeypatch)
    await connector.put(PutRequest("bucket", "dir/good", TEXT), b"1")
    objects = root / "bucket" / "objects"
    for name, content in (
        ("no json", ""),
        ("list", "[]"),
        ("outside", '{"file": "../../x", "etag": "", "size": 1, "media_type": "", "metadata": {}}'),
        ("nested", "[" * 100_000),
        ("size", ROW.format("a", "a", "Infinity", "2026-01-01")),
        ("big", ROW.format("a", "a", 1 << 70, "2026-01-01")),
        ("time", ROW.format("a", "a", 1, "0001-01-01T00:00:00+14:00")),
        ("file", ROW.format("\\u0000", "a", 1, "2026-01-01")),
        ("etag", ROW.format("a", "\\ud800", 1, "2026-01-01")),
        ("two\nlines", "{}"),
        ("caf\udce9", "{}"),
        ("%zz", "{}"),
    ):
        (objects / f"{name}.json").write_text(content)
    (objects / "loop.json").symlink_to("loop.json")
    (objects / "self%").symlink_to(".")
    found = [each.location.key async for each in connector.list("bucket")]
    assert found == ["dir/good"]


async def test_files_and_directories_are_private(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = connect(root, monkeypatch, file_mode=0o640)
    await connector.put(PutRequest("bucket", "dir/good", TEXT), b"1")
    for path in (root / "bucket" / "objects").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o640)
