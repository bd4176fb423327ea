"""The actions of a test on a simulated world: rules of the state machine and of the random walk."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fennflow.connectors import Capabilities
from remote import RemoteConnectorConfig
from remote_database import RemoteDatabase
from simulated import Call, Manner, SimulatedSession
from watched_log import WatchedLog
from world import BUCKET, DOUBT, LEASE, Fate, Quirks, World

KEYS = ("a", "b", "a/b")
FAULTS = tuple(each for each in Fate if each is not Fate.WORKS)
FATES = (*[Fate.WORKS] * 12, *FAULTS)
CALLS = (
    "put",
    "put",
    "put",
    "send",
    "create",
    "delete",
    "copy",
    "move",
    "get",
    "get",
    "read",
    "list",
    "both",
)
MANNERS: Sequence[Manner] = ("works", "works", "fails", "is cancelled", "is slow")
CONTROLS = ("end", "end", "end", "raise", "commit", "rollback", "savepoint", "release", "fail")
USER_CODE = ("step", "hook", "durable_step", "durable_hook", "hold")
PAUSES = (0.1, 5.0, LEASE / 2, LEASE + 1, DOUBT + 1)
KILLED = (Fate.FAILS, Fate.LOST, Fate.LATE)
BURSTS = (1, 2, 4, 8, 16)
MOST_STEPS = 20_000
MAX_PROCESSES = 4
MAX_SESSIONS = 6

Steps = Sequence[tuple[int, Fate]]


class Actions:
    """Up to six units of work at a time, in up to four processes, on one store and one database.

    Args:
        capabilities: of the store.
        directory: for SQLite; None to have the backend in memory.
        log: of the backend in the bucket; None for another one.
        database: of PostgreSQL; None for another one.
        server: a bucket on a real server; None to have the store in memory.
        repeats: whether values repeat, and with them ETags.
        quirks: of the store.
        strikes: the operations that fail; None for all.
        settings: of the configuration.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        *,
        directory: Path | None = None,
        log: WatchedLog | None = None,
        database: RemoteDatabase | None = None,
        server: RemoteConnectorConfig | None = None,
        repeats: bool = False,
        quirks: Quirks | None = None,
        strikes: Collection[str] | None = None,
        **settings: Any,
    ) -> None:
        self.world = World(
            capabilities=capabilities,
            directory=directory,
            log=log,
            database=database,
            server=server,
            quirks=quirks or Quirks(),
            strikes=strikes,
            settings={"lock_timeout": 2.0, **settings},
        )
        self.repeats = repeats
        self.values = 0
        self.sessions: list[SimulatedSession] = []
        self.deciding: list[tuple[int, asyncio.Task[None]]] = []
        self.processes = [self.world.new_process() for _ in range(2)]

    @property
    def living(self) -> list[SimulatedSession]:
        return [each for each in self.sessions if each.lives]

    @property
    def undecided(self) -> list[asyncio.Task[None]]:
        """Running decisions about held transactions in living processes."""
        dead = self.world.loop.dead
        return [task for process, task in self.deciding if process not in dead and not task.done()]

    @property
    def waiting(self) -> list[SimulatedSession]:
        return [each for each in self.living if each.waiting]

    # --- what users do -----------------------------------------------------------------------

    def open(self, index: int, *, auto_commit: bool) -> None:
        if len(self.living) < MAX_SESSIONS:
            process = self.processes[index % len(self.processes)]
            number = len(self.sessions) + 1
            session = SimulatedSession(self.world, process, number, auto_commit=auto_commit)
            self.sessions.append(session)
            session.start()

    def call(self, index: int, kind: str, keys: tuple[str, ...], manner: Manner = "works") -> None:
        if self.waiting and (len(keys) > 1 or kind not in {"copy", "move"}):
            self.values += 1
            value = b"same" if self.repeats and self.values % 2 else f"v{self.values}".encode()
            self.waiting[index % len(self.waiting)].do(Call(kind, keys, value, manner))

    def control(self, index: int, kind: str, manner: Manner = "works") -> None:
        if not self.waiting:
            return
        session = self.waiting[index % len(self.waiting)]
        if kind in {"release", "fail"} and not session.depth:
            kind = "end"
        elif kind in {"end", "raise", "commit", "rollback"} and session.depth:
            kind = "fail" if kind == "raise" else "release"
        self.values += 1
        session.do(Call(kind, value=b"%d" % self.values, manner=manner))

    def cancel(self, index: int) -> None:
        """Cancel a block, or a decision about a transaction that is held."""
        tasks = {f"s{each.number}": each.task for each in self.living}
        tasks |= {f"decision {number}": task for number, task in enumerate(self.undecided)}
        if tasks:
            name = list(tasks)[index % len(tasks)]
            self.world.note(f"cancel {name}")
            self.world.ambiguous = True
            with self.world.loop.running():
                tasks[name].cancel()

    def decide(self, index: int, *, commits: bool) -> None:
        """Commit or undo a transaction that is held, from any process."""
        held = list(self.world.held.values())
        if held:
            process = self.processes[index % len(self.processes)]
            chosen = held[index % len(held)]
            self.world.note(f"{process} decides {chosen.transaction_id}, commits={commits}")
            work = chosen.decide(self.world.uow(process), commits=commits)
            self.deciding.append((process, self.world.loop.spawn(process, work)))

    # --- what happens ------------------------------------------------------------------------

    def run(self, steps: Steps) -> None:
        loop = self.world.loop
        for which, fate in steps:
            self.world.fate = fate
            loop.choose = partial(_at, which)
            if not loop.step():
                break
        self.world.fate = Fate.WORKS
        loop.choose = partial(_at, 0)

    def wait(self, seconds: float) -> None:
        self.world.note(f"{seconds} s pass")
        self.world.trouble.update(self.processes)
        self.world.ambiguous = True
        self.world.loop.pass_time(seconds)

    def arrive(self, index: int) -> None:
        self.world.arrive(index)

    def kill(self, index: int, fate: Fate) -> None:
        process = self.processes.pop(index % len(self.processes))
        self.world.kill(process, arrives=lambda _: fate)
        self.processes.append(self.world.new_process())

    def stop_or_wake(self, index: int) -> None:
        process = self.processes[index % len(self.processes)]
        self.world.note(f"stop or wake {process}")
        self.world.trouble[process] += 1
        self.world.ambiguous = True
        self.world.loop.stopped ^= {process}

    def recover(self) -> None:
        process = self.world.new_process()
        self.world.loop.spawn(process, self.world.uow(process).recover())
        if len(self.processes) < MAX_PROCESSES:
            self.processes.append(process)

    def somebody_else_puts(self, key: str) -> None:
        self.values += 1
        self.world.put_foreign(key, f"foreign {self.values}".encode())

    def vanish(self) -> None:
        self.world.vanish()

    def bar(self, key: str) -> None:
        self.world.note(f"bar {key}")
        self.world.barred.add(key)

    # --- what must be true -------------------------------------------------------------------

    def check(self) -> None:
        for session in self.sessions:
            if session.task.done() and not session.task.cancelled():
                session.task.result()
            session.check_hooks()
        for _, task in self.deciding:
            if task.done() and not task.cancelled():
                task.result()
        for held in self.world.held.values():
            held.check()
        self.world.jobs.check()
        self.world.check()

    def finish(self) -> None:
        """End and recover all, check what must be true then, and forget it."""
        try:
            self.end()
        finally:
            self.world.close()

    def end(self) -> None:
        """End and recover all, and check what must be true then."""
        self.world.loop.stopped.clear()
        self._wait_for_user_code()
        if not self.living and not self.undecided:
            self.world.check_leases()
        self.world.quiesce()
        for session in self.sessions:
            session.check_hooks()

    def _wait_for_user_code(self) -> None:
        """Let living processes call their pending functions, and check that they do."""
        world = self.world
        world.faulty = False
        living = [each for each in self.sessions if each.process not in world.loop.dead]
        for _ in range(MOST_STEPS):
            if not any(each.waits_for_user_code for each in living) or not world.loop.step():
                break
        for session in living:
            session.check_hooks(over=True)


def _at(index: int, _ready: int) -> int:
    return index


def random_capabilities(choice: random.Random) -> Capabilities:
    hierarchical = choice.random() < 0.1
    return Capabilities(
        conditional_create=choice.random() < 0.6,
        conditional_delete=choice.choice(["batch", "single", "none"]),
        conditional_copy=choice.random() < 0.5,
        versioned=choice.random() < 0.3 and not hierarchical,
        hierarchical=hierarchical,
    )


def random_log(directory: Path, choice: random.Random) -> WatchedLog:
    """Return a log of processes whose clocks are right, or wrong by more than an hour."""
    skews = choice.choice([(0.0,), (0.0, 4000.0, -4000.0)])
    return WatchedLog(directory, BUCKET, skews=skews, max_batch=choice.choice([1, 256]))


def walk(
    seed: int,
    *,
    length: int = 60,
    directory: Path | None = None,
    logs: Path | None = None,
    database: RemoteDatabase | None = None,
    server: RemoteConnectorConfig | None = None,
    habits: Habits | None = None,
    capabilities: Capabilities | None = None,
    quirks: Quirks | None = None,
) -> list[str]:
    """Do things at random, and check after each of them; the same for the same seed.

    Without `habits` each walk does only some kinds of things, which ones is drawn first: what needs many of one kind
    is found sooner so ("swarm testing", Groce et al., ISSTA 2012).

    Args:
        seed: of the choices.
        length: how many things.
        directory: for SQLite.
        logs: for the local copies of a catalog in the bucket.
        database: of PostgreSQL.
        server: a bucket on a real server.
        habits: what is done.
        capabilities: of the store; None to draw them.
        quirks: of the store; None to draw them.

    Returns:
        what happened.

    Raises:
        AssertionError: something was not as it must be; with what had happened as notes.
    """
    choice = random.Random(seed)
    random.seed(seed)  # of the pauses between two attempts
    capabilities = capabilities or random_capabilities(choice)
    log = None if logs is None else random_log(logs, choice)
    if log is not None:
        capabilities = replace(capabilities, conditional_create=True)  # else there is no log
    actions = Actions(
        capabilities,
        directory=directory,
        log=log,
        database=database,
        server=server,
        repeats=choice.random() < 0.3,
        quirks=quirks or Quirks(choice.random() < 0.3, choice.random() < 0.3),
        strikes=None if habits is None else habits.strikes,
        validate_reads=choice.random() < 0.3,
        hide_pending=choice.random() < 0.2,
        keep_versions=choice.random() < 0.7,
    )
    habits = habits or Habits.drawn(choice)
    world = actions.world
    try:
        for _ in range(length):
            _act(actions, habits, choice)
            actions.check()
        actions.end()
    except BaseException as error:
        error.add_note(f"seed {seed}: {world.capabilities}, {world.settings}")
        error.add_note("\n".join(world.trace))
        raise
    finally:
        world.close()
    return world.trace


@dataclass(frozen=True)
class Habits:
    """What one walk does: some calls, some ends, faults of one rate, and some happenings.

    Args:
        keys: that it uses.
        calls: of sessions.
        controls: ends of blocks and savepoints, and what else is not about keys.
        fates: of operations.
        happens: what else happens.
        pauses: how long it waits.
        strikes: the operations that the fates happen to; None for all.
        manners: how the user's own code behaves.
        sessions: most of them at a time.
        bursts: how many steps the loop makes after each action.
    """

    keys: Sequence[str]
    calls: Sequence[str]
    controls: Sequence[str]
    fates: Sequence[Fate]
    happens: Sequence[str]
    pauses: Sequence[float] = PAUSES
    strikes: Collection[str] | None = None
    manners: Sequence[Manner] = MANNERS
    sessions: int = MAX_SESSIONS
    bursts: Sequence[int] = BURSTS

    @classmethod
    def drawn(cls, choice: random.Random) -> Habits:
        faulty = choice.choice((0, 1, 1, 2))
        faults = choice.sample(FAULTS, choice.randrange(1, len(FAULTS) + 1))
        return cls(
            keys=KEYS[: choice.randrange(1, 4)],
            calls=["put", *choice.sample(CALLS, choice.randrange(1, 6))],
            controls=[
                "end",
                *choice.sample(CONTROLS, choice.randrange(1, 6)),
                *choice.sample(USER_CODE, 2),
            ],
            fates=[*[Fate.WORKS] * 12, *faults * faulty],
            happens=choice.sample(HAPPENINGS, choice.randrange(len(HAPPENINGS) + 1)),
        )


HAPPENINGS = (
    "cancel",
    "wait",
    "arrive",
    "kill",
    "stop",
    "recover",
    "decide",
    "foreign",
    "vanish",
    "bar",
)


def _act(actions: Actions, habits: Habits, choice: random.Random) -> None:
    index = choice.randrange(8)
    kind = choice.choice(habits.calls)
    size = min(len(habits.keys), 2 if kind in {"copy", "move"} else choice.randrange(1, 4))
    keys = tuple(choice.sample(habits.keys, size))
    happenings: dict[str, Callable[[], None]] = {
        "cancel": lambda: actions.cancel(index),
        "wait": lambda: actions.wait(choice.choice(habits.pauses)),
        "arrive": lambda: actions.arrive(index),
        "kill": lambda: actions.kill(index, choice.choice(KILLED)),
        "stop": lambda: actions.stop_or_wake(index),
        "recover": actions.recover,
        "decide": lambda: actions.decide(index, commits=choice.random() < 0.7),
        "vanish": actions.vanish,
        "bar": lambda: actions.bar(choice.choice(habits.keys)),
        "foreign": lambda: actions.somebody_else_puts(choice.choice(habits.keys)),
    }

    def open_() -> None:
        auto_commit = choice.random() < 0.8
        if len(actions.living) < habits.sessions:
            actions.open(index, auto_commit=auto_commit)

    def control(index: int) -> None:
        actions.control(index, choice.choice(habits.controls), choice.choice(habits.manners))

    weighted: list[tuple[int, Callable[[], None]]] = [
        (12, open_),
        (33, lambda: actions.call(index, kind, keys, choice.choice(habits.manners))),
        (17, lambda: control(index)),
        (17, lambda: None),
        *((4, happenings[each]) for each in habits.happens),
    ]
    weights = [weight for weight, _ in weighted]
    [(_, action)] = choice.choices(weighted, weights)
    action()
    burst = choice.choice(habits.bursts)
    actions.run([(choice.randrange(8), choice.choice(habits.fates)) for _ in range(burst)])
