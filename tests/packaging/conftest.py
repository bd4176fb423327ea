"""The wheels, built once for all tests of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from packages import ROOT, UV, run


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build all distributions from a copy: an sdist each, and the wheel from that."""
    source = tmp_path_factory.mktemp("source")
    for name in ["pyproject.toml", "README.md", "LICENSE", "VERSION"]:
        shutil.copy(ROOT / name, source)
    for package in ROOT.glob("fennflow-*"):
        shutil.copytree(package, source / package.name)
    folder = tmp_path_factory.mktemp("wheels")
    run(UV, "build", "--quiet", "--all-packages", "--out-dir", folder, source)
    return folder
