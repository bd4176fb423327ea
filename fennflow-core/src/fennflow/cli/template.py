"""`fennflow new-plugin`: writes a package with a working connector, as a start for a plugin."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from fennflow.cli.app import Json, fail, show_json
from fennflow.cli.terminal import stdout
from fennflow.exceptions import FileException

NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
PLACES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "__init__.py": "src/{{module}}/__init__.py",
    "config.py": "src/{{module}}/config.py",
    "plugin.py": "src/{{module}}/plugin.py",
    "connector.py": "src/{{module}}/connector.py",
    "test_conformance.py": "tests/test_conformance.py",
}


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(new_plugin)


def new_plugin(
    distribution: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the new package: fennflow-acme.")
    ],
    directory: Annotated[Path, typer.Option(help="Where to create its folder.")] = Path(),
    *,
    as_json: Json = False,
) -> None:
    """Write a plugin package: a working connector, its tests, and its package metadata."""
    if not NAME.fullmatch(distribution):
        message = f"{distribution!r} is not a valid package name, such as fennflow-acme."
        raise typer.BadParameter(message)
    folder = directory / distribution
    if folder.exists():
        message = (
            f"{folder} already exists. Choose another name or --directory; nothing was written."
        )
        fail(FileException(message))
    name = distribution.removeprefix("fennflow-").replace("-", "_")
    names = {
        "{{distribution}}": distribution,
        "{{module}}": distribution.replace("-", "_"),
        "{{name}}": name,
        "{{Name}}": "".join(part.capitalize() for part in name.split("_")),
    }

    def named(text: str) -> str:
        for placeholder, value in names.items():
            text = text.replace(placeholder, value)
        return text

    template = files("fennflow.cli") / "plugin_template"
    written = {
        folder / named(place): (template / f"{source}.tmpl") for source, place in PLACES.items()
    }
    for path, source in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(named(source.read_text()))
    (folder / "src" / names["{{module}}"] / "py.typed").touch()
    if as_json:
        show_json([str(path) for path in written])
        return
    stdout.line(
        f"{folder} is a package with a connector that stores objects in a dictionary. Next:"
    )
    stdout.line(f"  cd {folder} && pip install -e '.[dev]' && pytest")
    stdout.line("  then replace the dictionary in connector.py with your store, method by method.")
