"""What the site adds to the pages: the changelog, and the files of the repository that pages link to."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?P<target>\.\./[^)#]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the changelog as a page, and as text what pages link to outside of docs."""
    files.append(
        File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text())
    )
    wanted: set[str] = set()
    for page in ROOT.glob("docs/**/*.md"):
        for link in LINK.finditer(page.read_text()):
            target = _target(page.relative_to(ROOT / "docs").as_posix(), link["target"])
            if target is not None and not target.endswith(".md"):
                wanted.add(target)
    for target in sorted(wanted):
        files.append(
            File.generated(config, f"source/{target}.txt", content=_readable(ROOT / target))
        )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave docs at what `on_files` has added."""
    source = page.file.src_uri

    def pointed(link: re.Match[str]) -> str:
        target = _target(source, link["target"])
        if target is None:
            return link[0]
        up = "../" * source.count("/")
        if target == "CHANGELOG.md":
            return f"]({up}changelog.md)"
        return f"]({up}source/{target}.txt)"

    markdown = LINK.sub(pointed, markdown)
    if source == "changelog.md":
        markdown = markdown.replace("](docs/", "](")
    return markdown


def _target(source: str, link: str) -> str | None:
    """Return the path of a link in the repository, if it leaves docs."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link))
    return None if path.startswith("docs/") else path


def _readable(path: Path) -> str:
    if path.is_dir():
        return "\n".join(sorted(each.relative_to(ROOT).as_posix() for each in path.rglob("*.*")))
    return path.read_text()
