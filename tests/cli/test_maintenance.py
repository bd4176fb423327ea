"""The program `fennflow`, run as users run it: plugins, guarantees, recovery, reconciliation."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import crashing
from crashing import start, text
from fennflow.testing import Boundary, Fault, S3Server
from shells import Shell
from stores import raw_client

pytestmark = pytest.mark.once


async def test_plugins_are_listed(shell: Shell) -> None:
    done = await shell("plugins")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[2].split() == [
        *("core", "fennflow-core", "1.0.0", "fennflow.files.plugin", "works")
    ]
    done = await shell("plugins", "--json", FENNFLOW_DISABLE_PLUGINS="s3")
    assert {each["name"]: each["state"] for each in done.json} == {
        "bucket": "works",
        "core": "works",
        "memory": "works",
        "obstore": "works",
        "s3": "off",
        "sqlalchemy": "works",
    }


async def test_the_doctor_reports_what_is_guaranteed(shell: Shell) -> None:
    done = await shell("doctor", "app:UOW")
    assert (done.code, done.err) == (0, "")
    assert "crashes are recovered from" in done.out
    assert "on one machine" in done.out
    assert "one by one" in done.out  # moto ignores the ETags of DeleteObjects
    assert "All is well." in done.out
    assert "\x1b[" not in done.out
    assert await shell.site.store.objects() == {}
    diagnosis = (await shell("doctor", "app:Holder.UOW", "--json")).json
    assert diagnosis["problems"] == []
    [found] = diagnosis["namespaces"].values()
    assert found["keeps_stamps"] is True
    assert abs(found["clock_skew"]) < 60


async def test_the_doctor_finds_what_is_wrong(shell: Shell) -> None:
    async with raw_client_of(shell) as client:
        await client.delete_bucket(Bucket=shell.site.namespace)
    done = await shell("doctor", "app:UOW")
    assert done.code == 3
    assert f"{shell.site.namespace} cannot be used: NoSuchNamespaceException" in done.out


async def test_the_doctor_measures_a_bucket_without_a_unit_of_work(
    shell: Shell, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    done = await shell("doctor", "--store", f"file://{tmp_path}/files", "--json")
    assert done.code == 0
    assert {"name": "reads ranges", "result": "yes", "detail": ""} in done.json
    done = await shell("doctor", "--store", f"s3://{shell.site.namespace}")
    assert "lets one of ten simultaneous creates succeed" in done.out
    assert await shell.site.store.objects() == {}
    for wrong in (
        [],
        ["app:UOW", "--store", "s3://a"],
        ["--store", "nothing"],
        ["--store", "s3://"],
        ["--store", f"file://{tmp_path}/missing"],
    ):
        assert (await shell("doctor", *wrong)).code == 2


def raw_client_of(shell: Shell) -> Any:
    return raw_client(S3Server(url=shell.environment["AWS_ENDPOINT_URL"]))


async def test_a_dead_process_is_seen_and_recovered_from(shell: Shell, moto: S3Server) -> None:
    async with shell.site.uow_class() as uow:
        await uow.files.put(text("old", "a"))
    process, pipe = start(crashing.die, shell.site, "a", Boundary("before", "copy"))
    await asyncio.to_thread(process.join)
    pipe.close()
    [transaction] = (await shell("transactions", "app:UOW", "--json")).json
    assert transaction["state"] == "committed"
    assert transaction["paths"] == [f"{shell.site.namespace}/a"]
    done = await shell("transactions", "app:UOW")
    assert transaction["transaction_id"] in done.out
    done = await shell("recover", "app:UOW")
    assert (done.code, "pending 1" in done.out) == (3, True)
    assert "alive, or was alive recently: 1." in done.out
    await shell.site.expire()
    with moto.failing(lambda each: Fault.CONFLICT if each.copy and each.key == "a" else None):
        done = await shell("recover", "app:UOW")
        assert done.code == 3
        assert "pending 1" in done.out
    await shell.site.expire()
    done = await shell("recover", "app:UOW", "--json")
    assert (done.code, done.json["rolled_forward"]) == (0, 1)
    assert (await shell("transactions", "app:UOW")).out == "No transaction is open.\n"
    assert await shell.site.store.objects() == {"a": b"new"}


async def test_a_held_transaction_is_shown_and_decided(shell: Shell) -> None:
    """P37."""
    held: list[str] = []
    for name in ("a", "b"):
        async with shell.site.uow_class() as uow:
            await uow.files.put(text("new", name))
            held.append(await uow.hold())
    for words in (["show", "app:UOW"], ["commit", held[0]], ["app:UOW", held[0]]):
        assert (await shell("transactions", *words)).code == 2
    unknown = await shell("transactions", "show", "app:UOW", "none")
    assert (unknown.code, "No transaction none" in unknown.err) == (1, True)
    shown = await shell("transactions", "show", "app:UOW", held[0])
    assert (shown.code, "create" in shown.out, "held" in shown.out) == (0, True, True)
    assert (await shell("transactions", "show", held[0], "app:UOW", "--json")).json[
        "state"
    ] == "held"
    assert (await shell("transactions", "commit", "app:UOW", held[0])).code == 0
    assert (await shell("transactions", "abort", "app:UOW", held[1])).code == 0
    again = await shell("transactions", "commit", "app:UOW", held[1])
    assert (again.code, "is not held" in again.err) == (1, True)
    assert await shell.site.store.objects() == {"a": b"new"}


async def test_differences_are_reported_and_corrected(shell: Shell) -> None:
    async with shell.site.uow_class() as uow:
        await uow.files.put(text("mine", "a"))
    async with raw_client_of(shell) as client:
        await client.put_object(Bucket=shell.site.namespace, Key="b[/]", Body=b"a stranger's")
    done = await shell("reconcile", "app:UOW")
    assert done.code == 3
    assert "2 objects, 1 records" in done.out
    assert "b[/]: unknown" in done.out
    done = await shell("reconcile", "app:UOW", "--strategy", "insert_missing", "--json")
    [report] = done.json.values()
    assert (done.code, report["actions"]) == (0, {"inserted": 1})
    assert report["findings"][0]["path"] == "b[/]"
    assert (await shell("reconcile", "app:UOW")).code == 0


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("app", "MODULE:CLASS"),
        ("app:", "MODULE:CLASS"),
        ("nosuch:UOW", "no module"),
        ("app:nothing", "no unit of work"),
        ("app:nosuch", "no unit of work"),
    ],
)
async def test_a_target_that_is_none_is_explained(shell: Shell, target: str, hint: str) -> None:
    done = await shell("transactions", target)
    assert (done.code, done.out) == (2, "")
    assert hint in done.err
    assert "Traceback" not in done.err


async def test_an_error_is_printed_without_a_traceback(shell: Shell) -> None:
    done = await shell("reconcile", "app:UOW", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert (done.code, done.out) == (1, "")
    *repeated, last = done.err.strip().splitlines()
    assert last.startswith("ConnectorUnavailableException: ")
    assert all("sent again after" in each for each in repeated)


async def test_help_suffices(shell: Shell) -> None:
    done = await shell()
    for command in ("plugins", "doctor", "transactions", "commits", "recover", "reconcile"):
        assert command in done.out
        help_text = (await shell(command, "--help")).out
        assert "--json" in help_text
