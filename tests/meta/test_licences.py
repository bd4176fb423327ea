"""The page on security lists every package that is installed with ours, under its licence."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def dependencies() -> set[str]:
    found: set[str] = set()
    for path in ROOT.glob("fennflow-*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        extras = project.get("optional-dependencies", {}).values()
        for text in [*project["dependencies"], *(each for extra in extras for each in extra)]:
            name = re.match(r"[\w.-]+", text)
            assert name is not None
            found.add(name[0].lower())
    return {name for name in found if not name.startswith("fennflow")}


def listed() -> dict[str, str]:
    rows = re.findall(
        r"^\| ([^|`]+) \| ([^|`]+) \|", (ROOT / "docs/security.md").read_text(), re.MULTILINE
    )
    return {
        name: licence
        for names, licences in rows
        for name, licence in zip(names.split(", "), licences.split(", "), strict=False)
    }


def test_all_are_listed() -> None:
    assert {name for name in listed() if name in dependencies()} == dependencies()


@pytest.mark.parametrize("name", sorted(dependencies()))
def test_a_licence_is_the_one_that_the_package_names(name: str) -> None:
    metadata = importlib.metadata.metadata(name)
    fields = ("License-Expression", "License", "Classifier")
    stated = " ".join(value for field in fields for value in metadata.get_all(field, []))
    assert listed()[name].partition("-")[0] in stated
