"""The former names of the backend contract still work for programs that import them."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio
from datetime import UTC, datetime
from fennflow import plugins, ConfigDict
from fennflow.backends import Commit, InMemoryBackendConfig, ObjectKey, Record, SessionToken
from fennflow.connectors import Location

async def main():
    config = ConfigDict(backend=InMemoryBackendConfig())
    backend = plugins.registry().backend_for(config.backend).factory(config.backend, config)
    session = SessionToken("01890000-0000-7000-8000-000000000000")
    now = datetime.now(UTC)
    record = Record(
        namespace="b", key="k", location=Location("k"), etag="e", size=1, media_type="text/plain",
        created_at=now, modified_at=now, session_id=session.session_id, seq=0,
    )
    await backend.open()
    await backend.stage(session, [], lambda _: ())
    await backend.commit(session, Commit(records=[record]))
    await backend.settle(session, keep_locked=[])
    print(list(await backend.records([ObjectKey("b", "k")])))
"""


def test_a_program_in_the_former_names_commits_a_record() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", f"{PROGRAM}\nasyncio.run(main())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[ObjectKey(namespace='b', key='k')]"
