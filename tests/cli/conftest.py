from __future__ import annotations

from pathlib import Path

import pytest

from fennflow.testing import S3Server
from shells import Shell, make_shell


@pytest.fixture
async def shell(request: pytest.FixtureRequest, moto: S3Server, tmp_path: Path) -> Shell:
    return await make_shell(request, moto, tmp_path)
