"""A fault at every object request in turn: afterwards everything is as before, or committed.

The requests are real HTTP requests, and the faults happen at the server.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest

from fennflow.exceptions import ConnectorUnavailableException
from fennflow.files import TextContent
from fennflow.testing import Fault, S3Request
from stores import FullUOW, Store, make_store

BEFORE = {"a": b"old a", "b": b"old b", "c": b"old c", "m": b"old m", "n": b"old n"}
UNMOVED = {key: body for key, body in BEFORE.items() if key != "b"}
AFTER = {
    "a": b"new a",
    "b": b"new b",
    "d": b"new d",
    "f": b"new f",
    "g": b"old m",
    "n": b"old m",
}


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


async def seed(uow_class: type[FullUOW], folder: str = "") -> None:
    async with uow_class() as uow:
        files = uow.files.at(folder) if folder else uow.files
        await files.put(*(text(body.decode(), key) for key, body in BEFORE.items()))


async def change(uow_class: type[FullUOW], folder: str) -> None:
    async with uow_class() as uow:
        files = uow.files.at(folder) if folder else uow.files
        await files.put(text("new a", "a"), text("new d", "d"))
        await files.delete("b", "c")
        await files.put(text("new b", "b"))
        await files.create(text("new f", "f"))
        await files.copy("m", "g")
        await files.move("m", "n")


class StopError(Exception):
    """Ends a block."""


async def give_up(uow_class: type[FullUOW], folder: str) -> None:
    async with uow_class() as uow:
        files = uow.files.at(folder) if folder else uow.files
        await files.put(text("new a", "a"), text("new d", "d"))
        await files.delete("b", "c")
        await files.create(text("new f", "f"))
        await files.copy("m", "g")
        await files.move("m", "n")
        raise StopError


async def everything(store: Store, uow_class: type[FullUOW], folder: str = "") -> dict[str, bytes]:
    """Return the objects of a folder, and of the reserved prefix; the catalog lists the same."""
    objects = await store.objects(folder and f"{folder}/")
    if folder:
        objects |= await store.objects(".fennflow/")
    async with uow_class() as uow:
        paths = await (uow.files.at(folder) if folder else uow.files).list()
        assert {file.path: file.data for file in await uow.files.get(*paths)} == objects
    return {key.removeprefix(f"{folder}/"): body for key, body in objects.items()}


class FaultAt:
    """Fails the n-th request."""

    def __init__(self, number: int, fault: Fault) -> None:
        self.left = number
        self.fault = fault

    def __call__(self, _request: S3Request) -> Fault | None:
        self.left -= 1
        return self.fault if self.left == -1 else None


FAULTS = [Fault.BEFORE, Fault.AFTER, Fault.CUT]
CASES = [
    *(
        pytest.param("moto", fault, marks=() if fault is Fault.AFTER else pytest.mark.thorough)
        for fault in FAULTS
    ),
    *(pytest.param("strict", fault, marks=pytest.mark.once) for fault in FAULTS),
    # On other servers every change runs the most ambiguous fault.
    *(
        pytest.param(
            kind, fault, marks=pytest.mark.once if fault is Fault.CUT else pytest.mark.thorough
        )
        for kind in ("strict-versioned", "obstore-moto", "seaweedfs", "seaweedfs-versioned")
        for fault in FAULTS
    ),
]


@pytest.mark.parametrize(("kind", "fault"), CASES)
async def test_a_fault_at_any_request_of_a_transaction_leaves_all_or_nothing(
    kind: str, fault: Fault, request: pytest.FixtureRequest
) -> None:
    # One bucket, client and probe for all faults; each has a folder of its own.
    store = await make_store(kind, request, max_attempts=1)
    assert store.server is not None
    uow_class = store.uow(lock_timeout=0.0)
    committed = undone = 0
    for number in itertools.count():
        folder = str(number)
        await seed(uow_class, folder)
        script = FaultAt(number, fault)
        with store.server.failing(script):
            try:
                await change(uow_class, folder)
            except ConnectorUnavailableException:
                undone += 1
                expected = BEFORE
            else:
                committed += 1
                expected = AFTER
        assert await everything(store, uow_class, folder) == expected, f"at request {number}"
        if script.left >= 0:
            break
    assert undone >= (3 if fault is Fault.BEFORE else 1 if kind == "moto" else 3)
    assert committed >= 2


@pytest.mark.parametrize(("kind", "fault"), CASES)
async def test_a_fault_while_undoing_is_overcome(
    kind: str, fault: Fault, request: pytest.FixtureRequest
) -> None:
    store = await make_store(kind, request, max_attempts=1)
    assert store.server is not None
    uow_class = store.uow(lock_timeout=0.0)
    for number in itertools.count():
        folder = str(number)
        await seed(uow_class, folder)
        script = FaultAt(number, fault)
        with (
            store.server.failing(script),
            pytest.raises((StopError, ConnectorUnavailableException)) as caught,
        ):
            await give_up(uow_class, folder)
        assert not getattr(caught.value, "__notes__", [])
        assert await everything(store, uow_class, folder) == BEFORE, f"at request {number}"
        if script.left >= 0:
            break


async def test_an_unreachable_server_during_the_undo_is_reported_and_masks_nothing(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("moto", request, max_attempts=1)
    assert store.server is not None
    uow_class = store.uow(late_write_period=0.5)
    await seed(uow_class)
    with pytest.raises(StopError) as caught:
        async with uow_class() as uow:
            await uow.files.put(text("new a", "a"), text("new d", "d"))
            store.server.fault = lambda _: Fault.BEFORE
            raise StopError
    store.server.fault = lambda _: None
    [note] = caught.value.__notes__
    assert "is not undone completely" in note
    await uow_class.recover()
    async with uow_class() as uow:
        assert await uow.files.list() == list(BEFORE)
        assert (await uow.files.get("a")).one().data == b"old a"
    # Recovery has finished the undoing, and the keys are free after the late-write period.
    assert await everything(store, uow_class) == BEFORE
    async with uow_class() as uow:
        await uow.files.put(text("newer a", "a"), text("newer d", "d"))


async def test_a_server_that_stays_away_after_the_pivot_does_not_fail_the_commit(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    store = await make_store("moto", request, max_attempts=1)
    assert store.server is not None
    uow_class = store.uow(lock_timeout=0.0)
    await seed(uow_class)
    async with uow_class() as uow:
        await uow.files.put(text("new a", "a"), text("new d", "d"))
        await uow.files.delete("b")
        store.server.fault = lambda request: (
            Fault.BEFORE if request.operation in {"COPY", "BATCH DELETE"} else None
        )
    store.server.fault = lambda _: None
    assert "is committed and will be applied later" in caplog.text
    await uow_class.recover()
    async with uow_class() as uow:
        assert await uow.files.list() == ["a", "c", "d", "m", "n"]
        assert (await uow.files.get("a")).one().data == b"new a"
    assert await everything(store, uow_class) == UNMOVED | {
        "a": b"new a",
        "d": b"new d",
    }
    async with uow_class() as uow:
        await uow.files.put(text("newer a", "a"))


async def test_a_call_that_fails_is_undone_and_the_transaction_goes_on(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("moto", request, max_attempts=1)
    assert store.server is not None
    uow_class = store.uow()
    await seed(uow_class)
    async with uow_class() as uow:
        await uow.files.put(text("first", "d"))
        files = [text("second", f"many/{number}") for number in range(98)]
        store.server.fault = lambda request: (
            Fault.BEFORE if request.key.endswith("many/50") else None
        )
        with pytest.raises(ConnectorUnavailableException, match="many/50"):
            await uow.files.put(text("new a", "a"), *files, text("third", "d"))
        store.server.fault = lambda _: None
        assert await uow.files.list() == ["a", "b", "c", "d", "m", "n"]
        assert (await uow.files.get("d")).one().data == b"first"
        await uow.files.delete("b")
    assert await everything(store, uow_class) == UNMOVED | {"d": b"first"}


async def test_of_two_transactions_racing_for_one_key_the_second_waits(store: Store) -> None:
    uow_class = store.uow(lock_timeout=60.0)
    order: list[str] = []
    wrote = asyncio.Event()

    async def first() -> None:
        async with uow_class() as uow:
            await uow.files.put(text("first", "a"))
            order.append("first wrote")
            wrote.set()
            await asyncio.sleep(0.1)
            order.append("first ends")

    async def second() -> None:
        await wrote.wait()
        async with uow_class() as uow:
            await uow.files.put(text("second", "a"))
            order.append("second wrote")

    async with asyncio.TaskGroup() as group:
        group.create_task(first())
        group.create_task(second())
    assert order == ["first wrote", "first ends", "second wrote"]
    assert (await store.objects())["a"] == b"second"
