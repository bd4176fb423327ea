"""Isolation, checked from outside: histories of concurrent transactions, and their dependency graph.

Every value is written once, so a read shows which write it saw. Names are those of Adya, "Weak
Consistency" (1999): G1a: reads of aborted values; G1b: reads of values that their transaction
overwrote; G1c: cycles of writes and reads; G2-item: cycles with an overwritten read. Read committed
(PL-2) has none of the first three, repeatable read (PL-2.99) none at all. For transactions that
only read, only the values are checked; they are not in the graph, since they have no pivot.
`docs/concepts.md` has the result.
"""

from __future__ import annotations

import graphlib
import itertools
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from actions import random_capabilities
from fennflow.exceptions import ConflictException, RecordLockedException
from fennflow.files import TextContent
from stores import FullUOW
from world import World

KEYS = ("a", "b", "c")
WORKERS = 4
SESSIONS = 6
WALKS = 150 if "FENNFLOW_THOROUGH" in os.environ else 70

Values = Mapping[str, str | None]


@dataclass(eq=False)
class Txn:
    """A transaction as its user sees it.

    Args:
        reads: each with what the transaction had written by then.
        writes: what it wrote last under each key.
        overwritten: values that it replaced itself.
    """

    reads: list[tuple[Values, Values]] = field(default_factory=list[tuple[Values, Values]])
    writes: dict[str, str] = field(default_factory=dict[str, str])
    overwritten: set[str] = field(default_factory=set[str])
    committed: bool = False


class AbortError(Exception):
    """Ends a block because the user wants it to."""


@dataclass
class History:
    """All transactions, and the committed ones in the order of their pivots."""

    txns: list[Txn] = field(default_factory=list[Txn])
    order: list[Txn] = field(default_factory=list[Txn])

    @property
    def states(self) -> list[dict[str, str]]:
        """The committed state after each pivot."""
        states: list[dict[str, str]] = [{}]
        for txn in self.order:
            states.append({**states[-1], **txn.writes})
        return states

    def check_reads(self) -> None:
        """Check for own writes, G1a, G1b, and that each call sees one moment (I9)."""
        writer = {value: txn for txn in self.txns for value in txn.writes.values()}
        replaced = {value for txn in self.txns for value in txn.overwritten}
        for txn in self.txns:
            for own, seen in txn.reads:
                for key, value in seen.items():
                    if key in own:
                        assert value == own[key], "a session does not see its own write"
                    elif value is not None:
                        assert value not in replaced, f"G1b: {value}"
                        assert writer[value].committed, f"G1a: {value}"
                others = {key: value for key, value in seen.items() if key not in own}
                fits = any(
                    all(state.get(key) == value for key, value in others.items())
                    for state in self.states
                )
                assert fits, f"I9: {others} was never all there at once"

    def has_circle(self, *, with_overwritten_reads: bool) -> bool:
        """Whether committed transactions depend on each other in a cycle: G1c, optionally G2-item."""
        graph: dict[Txn, set[Txn]] = {txn: set() for txn in self.order}
        for before, after in self._edges(with_overwritten_reads=with_overwritten_reads):
            if before is not after:
                graph[after].add(before)
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError:
            return True
        return False

    def _edges(self, *, with_overwritten_reads: bool) -> Iterator[tuple[Txn, Txn]]:
        versions = {key: [txn for txn in self.order if key in txn.writes] for key in KEYS}
        for writers in versions.values():
            yield from itertools.pairwise(writers)
        for txn in self.order:
            for own, seen in txn.reads:
                for key, value in seen.items():
                    if key in own:
                        continue
                    values = [None, *(each.writes[key] for each in versions[key])]
                    index = values.index(value)
                    if index:
                        yield versions[key][index - 1], txn
                    if with_overwritten_reads and index < len(versions[key]):
                        yield txn, versions[key][index]


def abort_sometimes(choice: random.Random) -> None:
    if choice.random() < 0.2:
        raise AbortError


async def work(
    world: World, uow_class: type[FullUOW], history: History, choice: random.Random
) -> None:
    """Run transactions one after the other, with random reads and writes."""
    for _ in range(SESSIONS):
        txn = Txn()
        history.txns.append(txn)
        try:
            async with uow_class() as uow:
                session: Any = uow._session

                def pivot(txn: Txn = txn) -> None:
                    txn.committed = True
                    history.order.append(txn)

                world.on_pivot[session._tx.transaction_id] = pivot
                for _ in range(choice.randrange(1, 5)):
                    await act(uow, txn, history, choice)
                abort_sometimes(choice)
            if not txn.writes:
                txn.committed = True  # it has no pivot, and no other can depend on it
        except (AbortError, ConflictException, RecordLockedException):
            assert not txn.committed


async def act(uow: FullUOW, txn: Txn, history: History, choice: random.Random) -> None:
    if choice.random() < 0.5:
        keys = choice.sample(KEYS, choice.randrange(1, 4))
        own = dict(txn.writes)
        seen: dict[str, str | None] = dict.fromkeys(keys)
        for file in await uow.files.get(*keys, missing_ok=True):
            assert isinstance(file.data, bytes)
            seen[str(file.path)] = file.data.decode()
        txn.reads.append((own, seen))
        return
    key = choice.choice(KEYS)
    value = f"{len(history.txns)}.{choice.getrandbits(60)}"
    await uow.files.put(TextContent.from_content(value, filename=key))
    if key in txn.writes:
        txn.overwritten.add(txn.writes[key])
    txn.writes[key] = value


def recorded(seed: int, *, validate_reads: bool, directory: Path | None = None) -> History:
    """Run workers, each in a separate process, in an order determined by the seed."""
    choice = random.Random(seed)
    random.seed(seed)
    world = World(
        random_capabilities(choice),
        directory,
        settings={"lock_timeout": 0.5, "validate_reads": validate_reads},
    )
    history = History()
    world.loop.choose = choice.randrange
    try:
        tasks = []
        for _ in range(WORKERS):
            process = world.new_process()
            todo = work(world, world.uow(process), history, choice)
            tasks.append(world.loop.spawn(process, todo))
        while not all(task.done() for task in tasks):
            assert world.loop.step()
        for task in tasks:
            task.result()
    finally:
        world.close()
    return history


def check(histories: Sequence[History]) -> None:
    for history in histories:
        history.check_reads()
        assert not history.has_circle(with_overwritten_reads=False), "G1c"


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.parametrize("on_sqlite", [False, True])
def test_transactions_are_read_committed_and_each_call_sees_one_moment(*, on_sqlite: bool) -> None:
    """PL-2, but not more: a value that a transaction has read may be overwritten before it commits."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) if on_sqlite else None
        histories = [
            recorded(seed, validate_reads=False, directory=directory)
            for seed in range(WALKS // (7 if on_sqlite else 1))
        ]
    check(histories)
    assert any(each.has_circle(with_overwritten_reads=True) for each in histories)


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.parametrize("on_sqlite", [False, True])
def test_with_validate_reads_transactions_are_repeatable_read(*, on_sqlite: bool) -> None:
    """PL-2.99: no lost update, no write skew on the paths that a transaction has read."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) if on_sqlite else None
        histories = [
            recorded(seed, validate_reads=True, directory=directory)
            for seed in range(WALKS // (7 if on_sqlite else 1))
        ]
    check(histories)
    assert sum(len(each.order) for each in histories) > len(histories)
    for history in histories:
        assert not history.has_circle(with_overwritten_reads=True), "G2-item"
