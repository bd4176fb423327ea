"""The site builds without a warning, its links lead somewhere, and it fetches nothing from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from typing_extensions import override

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """What a page links to, loads, and can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.anchors.update(found.get("id", "").split())
        if tag == "a":
            self.links.add(found.get("href", ""))
        elif tag in {"script", "img"}:
            self.loaded.add(found.get("src", ""))
        elif tag == "link" and found.get("rel") in {"stylesheet", "icon"}:
            self.loaded.add(found.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return directory


@pytest.mark.docs
def test_all_links_lead_somewhere_and_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 30
    for path, page in pages.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link not in page.loaded
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), (path.name, link)
            if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                assert parts.fragment in pages[target].anchors, (path.name, link)


@pytest.mark.docs
def test_the_reference_has_what_is_exported(site: Path) -> None:
    anchors = Page(site / "reference.html").anchors
    for name in ("UnitOfWork", "repositories.StreamRepository.open", "files.ModelContent"):
        assert f"fennflow.{name}" in anchors
    assert "fennflow_s3.config.S3ConnectorConfig" in anchors


@pytest.mark.docs
def test_there_is_a_digest_for_language_models(site: Path) -> None:
    digest = (site / "llms.txt").read_text()
    for page in ("tutorial", "concepts", "plugins", "reference"):
        assert f"{page}.md" in digest
        assert (site / f"{page}.md").exists()
    assert "UnitOfWork" in (site / "llms-full.txt").read_text()
