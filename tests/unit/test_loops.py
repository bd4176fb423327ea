"""The event loop of the command line."""

from __future__ import annotations

import asyncio
import sys

import pytest

from fennflow.cli.app import run
from fennflow.engine.concurrency import Periodic


async def loop_of() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_uvloop_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvloop")
    assert run(loop_of()) == "uvloop"
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run(loop_of()) == "asyncio"


def test_work_that_is_due_at_once_is_done_on_uvloop() -> None:
    """Its timers that are due at once have no `when`."""
    pytest.importorskip("uvloop")

    async def both() -> tuple[int, float]:
        turns, done = 0, asyncio.Event()

        async def work() -> bool:
            nonlocal turns
            turns += 1
            done.set()
            return False

        periodic = Periodic(3600.0, work)
        periodic.start(delay=0.0)
        periodic.start(delay=0.0)
        await done.wait()
        await periodic.aclose()
        return turns, periodic.late

    turns, late = run(both())
    assert (turns, late >= 0.0) == (1, True)
