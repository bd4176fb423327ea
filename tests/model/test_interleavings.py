"""Two transactions over two keys, in every interleaving with at most two preemptions.

They are in separate processes and share only the store and the journal, so it is enough to switch
between two operations there. The first transaction runs for i operations, then the second for j,
then the first to its end, and the second to its end; every i and j is tried. So each run has two
switches that the scheduler forces. Most bugs of concurrency need no more (Musuvathi and Qadeer, PLDI
2007). The gate takes a sample of them, `nox -s thorough` takes all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import pytest

from fennflow.connectors import Capabilities
from simulated import Call, SimulatedSession
from world import World

END = Call("end")
SCRIPTS: dict[str, tuple[Sequence[Call], Sequence[Call]]] = {
    "two that write": (
        [Call("put", ("a", "b"), b"first"), END],
        [Call("put", ("b", "a"), b"second"), END],
    ),
    "one that writes and one that reads": (
        [Call("put", ("a", "b"), b"first"), END],
        [Call("get", ("a", "b")), Call("list"), Call("get", ("a", "b")), END],
    ),
    "one that fails and one that writes": (
        [Call("put", ("a", "b"), b"first"), Call("raise")],
        [Call("create", ("c",), b"second"), Call("put", ("a",), b"second"), END],
    ),
    "one that moves and one that deletes": (
        [Call("move", ("a", "b")), END],
        [Call("delete", ("b", "a")), Call("put", ("b",), b"second"), END],
    ),
}
STORES = {
    "full": Capabilities(
        conditional_create=True, conditional_delete="batch", conditional_copy=True
    ),
    "weak": Capabilities(),
    "versioned": Capabilities(conditional_create=True, versioned=True),
}
MANY = 1 << 30
SHARE = 1.0 if "FENNFLOW_THOROUGH" in os.environ else 0.3
"""Of the interleavings, how many are taken."""


class Pair:
    """The two transactions, each in a separate process, on a bucket that holds `a` and `b`."""

    def __init__(self, capabilities: Capabilities, scripts: Sequence[Sequence[Call]]) -> None:
        self.world = World(capabilities, settings={"lock_timeout": 2.0})
        before = self._session([Call("put", ("a", "b"), b"before"), END], 0)
        while not before.task.done():
            self.world.loop.step()
        self.sessions = [self._session(calls, n) for n, calls in enumerate(scripts, start=1)]

    def _session(self, calls: Sequence[Call], number: int) -> SimulatedSession:
        session = SimulatedSession(self.world, self.world.new_process(), number)
        session.start()
        for call in calls:
            session.do(call)
        return session

    def run(self, which: int, operations: int) -> int:
        """Run one of the transactions, with the other one stopped, and return its number of operations."""
        session, other = self.sessions[which], self.sessions[1 - which]
        loop = self.world.loop
        loop.stopped = {other.process}
        before = self.world.effects
        while self.world.effects - before < operations and not session.task.done() and loop.step():
            pass
        self.world.check()
        return self.world.effects - before

    def finish(self) -> None:
        """Check the results of the transactions, and the state after their end."""
        try:
            for session in self.sessions:
                assert session.task.done()
                session.task.result()
            self.world.loop.stopped.clear()
            self.world.quiesce()
        finally:
            self.world.close()


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.timeout(900)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_no_interleaving_breaks_an_invariant(name: str, store: str) -> None:
    pair = Pair(STORES[store], SCRIPTS[name])
    longest = [pair.run(0, MANY), pair.run(1, MANY)]
    pair.finish()
    choice = random.Random(f"{os.environ['FENNFLOW_SEED']} {name} {store}")
    for first in range(longest[0] + 1):
        for second in range(1, longest[1] + 1):
            if choice.random() >= SHARE:
                continue
            pair = Pair(STORES[store], SCRIPTS[name])
            try:
                pair.run(0, first)
                pair.run(1, second)
                pair.run(0, MANY)
                pair.run(1, MANY)
                pair.finish()
            except BaseException as error:
                error.add_note(f"i={first}, j={second}")
                error.add_note("\n".join(pair.world.trace))
                raise
