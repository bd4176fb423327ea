"""The event loop of the command line."""

from __future__ import annotations

import asyncio
import sys

import pytest

from fennflow.cli.app import run


async def loop_of() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_uvloop_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvloop")
    assert run(loop_of()) == "uvloop"
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run(loop_of()) == "asyncio"
