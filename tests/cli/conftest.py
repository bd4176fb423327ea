from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest

from fennflow.cli import terminal
from fennflow.testing import S3Server
from shells import Program, Shell, make_shell


@pytest.fixture
async def shell(request: pytest.FixtureRequest, moto: S3Server, tmp_path: Path) -> Shell:
    return await make_shell(request, moto, tmp_path)


@pytest.fixture
def program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Program:
    """Return the program, run in this process, in a directory with a user's module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(terminal, "guard", lambda: None)  # it changes the process permanently
    return Program(tmp_path, f"app_{uuid.uuid4().hex}", monkeypatch, capfdbinary)
