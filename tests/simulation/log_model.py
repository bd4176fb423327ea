"""An executable model of the log in the bucket (docs/design/009), searched for a schedule that breaks it.

The state is a lock table and the last entry of each writer. `run` plays one random schedule of up to eight
processes with lost, late and repeated requests, stalls, snapshots and deletion, and returns what is wrong
with it. `MECHANISMS` names what can be switched off, and seeds of schedules that then break.

To search longer: `python tests/simulation/log_model.py RUNS SEED MECHANISM`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

RETENTION = 40
"""How long a snapshot has to exist before the entries that it replaces are deleted."""
TRUSTED = 12
"""How long a contact is trusted."""
LATE = 15
"""How late a request may arrive."""
TRIES = 6
FAULTS = 10

MECHANISMS: Mapping[str, Sequence[int]] = {
    "condition": (3,),
    "twice": (162,),
    "readback": (0,),
    "batch": (1,),
    "boundary": (3238,),
    "contact": (36041, 139900),
    "gap": (22372,),
    "writers": (0,),
    "age": (262,),
    "entry": (647,),
    "look": (20,),
    "time": (6,),
}
"""What can be switched off, and seeds of schedules that then break a rule.

    condition: entries are written without If-None-Match (L1).
    twice: an entry that its writer sent twice is applied twice (L2).
    readback: a lost response counts as a failure (L3).
    batch: the commands of an entry share the answer of the first (L4).
    boundary: a success, and an absent entry, are believed at any age of the contact (L5).
    contact: the age of a contact is counted from its last request instead of its first (L5).
    gap: a load goes on after a gap, and however long it took (L6).
    writers: a snapshot leaves out the sequence numbers of the writers (L7).
    age: entries are deleted whatever the age of the snapshot (L8).
    entry: the age of the entry counts instead of that of the snapshot (L8).
    look: a read does not ask for the next position (L9).
    time: the time of an entry is what its writer proposes, even if it is before that of the last (L10).

tests/faults/test_bucket_log.py switches off those of L11, L12 and L13.
"""

State = dict[Any, Any]
Command = tuple[int, Literal["take", "free"], str, str]
Entry = tuple[tuple[str, int], int, tuple[Command, ...]]
Steps = Generator[None, None, Any]


class LostError(Exception):
    """The response was lost."""


class RefusedError(Exception):
    """412: there is an object under the name."""


@dataclass
class Bucket:
    """A store with a clock, and requests that are on their way."""

    rng: random.Random
    off: str | None
    time: int = 0
    objects: dict[tuple[str, int], tuple[Any, int]] = field(default_factory=dict[Any, Any])
    under_way: list[tuple[int, tuple[str, int], Any]] = field(default_factory=list[Any])
    faults: int = FAULTS
    truth: dict[int, Entry] = field(default_factory=dict[int, Entry])

    def create(self, name: tuple[str, int], body: Any) -> None:
        unconditional = self.off == "condition" and name[0] == "log"
        if name in self.objects and not unconditional:
            raise RefusedError
        self.objects[name] = (body, self.time)
        if name[0] == "log":
            self.truth.setdefault(name[1], body)

    def put(self, name: tuple[str, int], body: Any) -> None:
        if self.faults and self.rng.random() < 0.12:
            self.faults -= 1
            fate = self.rng.randrange(3)
            if fate == 1:
                self._try(name, body)
            if fate == 2:
                self.under_way.append((self.time + self.rng.randrange(1, LATE), name, body))
            raise LostError
        self.create(name, body)

    def _try(self, name: tuple[str, int], body: Any) -> None:
        with suppress(RefusedError):
            self.create(name, body)

    def tick(self) -> None:
        self.time += 1
        for each in [each for each in self.under_way if each[0] <= self.time]:
            self.under_way.remove(each)
            self._try(each[1], each[2])

    def names(self, kind: str, after: int = -1) -> list[int]:
        return sorted(number for name, number in self.objects if name == kind and number > after)


def apply(state: State, entry: Entry, off: str | None) -> dict[int, bool]:
    """Apply an entry, and return the answers of its commands; the same on every replica."""
    (writer, seq), at, commands = entry
    if off != "twice" and state.get(("writer", writer), (0, None))[0] >= seq:
        return {}
    state["time"] = at if off == "time" else max(at, state.get("time", 0))
    answers: dict[int, bool] = {}
    for number, kind, key, who in commands:
        if kind == "take":
            answers[number] = state.get(key) in {None, who}
            if answers[number]:
                state[key] = who
        else:
            answers[number] = state.get(key) == who
            if answers[number]:
                del state[key]
    state["writer", writer] = (seq, answers)
    return answers


@dataclass
class Replica:
    """A process. Its generators yield before every request, where anything else may happen."""

    bucket: Bucket
    name: str
    position: int | None = None
    state: State = field(default_factory=dict[Any, Any])
    contact: int = 0
    seq: int = 0

    @property
    def trusted(self) -> bool:
        return self.bucket.off == "boundary" or self.bucket.time - self.contact <= TRUSTED

    @property
    def now(self) -> int:
        """The estimate of the store's time, which is never ahead of it."""
        return max(0, self.bucket.time - len(self.name) - int(self.name[1:]) % 3)

    def load(self) -> Steps:
        bucket = self.bucket
        while True:
            yield
            start = bucket.time
            snapshot = max(bucket.names("snapshot"), default=-1)
            state: State = {}
            yield
            if snapshot >= 0:
                if ("snapshot", snapshot) not in bucket.objects:
                    continue
                state = dict(bucket.objects["snapshot", snapshot][0])
            yield
            found = bucket.names("log", snapshot)
            entries: list[tuple[int, Entry]] = []
            for number in found:
                yield
                if ("log", number) not in bucket.objects:
                    break
                entries.append((number, bucket.objects["log", number][0]))
            expected = list(range(snapshot + 1, snapshot + 1 + len(found)))
            if [number for number, _ in entries] != expected and bucket.off != "gap":
                continue  # names were deleted meanwhile
            first = bucket.time if bucket.off == "contact" else start
            if bucket.time - first > TRUSTED and bucket.off != "gap":
                continue
            for _, entry in entries:
                apply(state, entry, bucket.off)
            self.position, self.state, self.contact = snapshot + len(entries), state, first
            return

    def refresh(self) -> Steps:
        """Apply what others wrote: afterwards the state is that of a moment not before the call."""
        if self.position is None:
            yield from self.load()
        elif self.bucket.off == "look":
            return
        while True:
            assert self.position is not None
            start = self.bucket.time
            yield
            found = self.bucket.objects.get(("log", self.position + 1))
            if found is None and self.trusted:
                self.contact = start
                return
            if not self.trusted:
                yield from self.load()
                if found is None:
                    return
                continue
            assert found is not None
            apply(self.state, found[0], self.bucket.off)
            self.position += 1

    def append(self, commands: Sequence[Command]) -> Steps:  # noqa: C901, PLR0912 - L1 to L5, in one place
        """Return the answers, and whether they are `ok`, `unknown` or `failed`."""
        if self.position is None:
            yield from self.load()
        self.seq += 1
        entry: Entry = ((self.name, self.seq), self.now, tuple(commands))
        tries = 0
        while True:
            assert self.position is not None
            name, start = ("log", self.position + 1), self.bucket.time
            yield
            mine = False
            there: Entry = entry
            try:
                self.bucket.put(name, entry)
                mine = True
            except RefusedError:
                pass
            except LostError:
                if self.bucket.off == "readback":
                    return None, "failed"
            if not mine:
                yield
                found = self.bucket.objects.get(name)
                if found is None:
                    if not self.trusted:
                        yield from self.load()
                        tries += 1
                    tries += 1
                    if tries > TRIES:
                        return None, "unknown"
                    continue  # the same entry at the same position
                there = found[0]
                mine = there[0] == entry[0]
            if not self.trusted:
                # It may be below a boundary: a load says whether it counted.
                yield from self.load()
            else:
                if mine:
                    self.contact = max(self.contact, start)
                apply(self.state, there, self.bucket.off)
                self.position += 1
            seq, answers = self.state.get(("writer", self.name), (0, None))
            if seq == self.seq:
                if self.bucket.off == "batch":
                    answers = dict.fromkeys(answers, next(iter(answers.values())))
                return answers, "ok"

    def snapshot(self) -> Steps:
        if self.position is None:
            yield from self.load()
        assert self.position is not None
        if self.position >= 0:
            name, state = ("snapshot", self.position), dict(self.state)
            if self.bucket.off == "writers":
                state = {key: value for key, value in state.items() if isinstance(key, str)}
            yield
            with suppress(LostError, RefusedError):
                self.bucket.put(name, state)

    def collect(self) -> Steps:  # noqa: C901 - L8, in one place
        bucket = self.bucket
        yield
        snapshots = bucket.names("snapshot")
        kind = "log" if bucket.off == "entry" else "snapshot"

        def is_old(number: int) -> bool:
            if (kind, number) not in bucket.objects:
                return False
            age = bucket.time - bucket.objects[kind, number][1]
            return bucket.off == "age" or age > RETENTION

        old = [number for number in snapshots if is_old(number)]
        if not old:
            return
        last = old[-1]
        if bucket.off != "boundary":
            yield
            try:
                bucket.put(("boundary", last), None)
            except LostError:
                return
            except RefusedError:
                pass
        for number in bucket.names("log"):
            if number <= last:
                yield
                bucket.objects.pop(("log", number), None)
        for number in snapshots:
            if number < last:
                yield
                bucket.objects.pop(("snapshot", number), None)


@dataclass
class Run:
    """One schedule: what processes were answered, and what is wrong."""

    rng: random.Random
    bucket: Bucket
    commands: int = 0
    answered: dict[int, bool] = field(default_factory=dict[int, bool])
    failed: set[int] = field(default_factory=set[int])
    wrong: list[str] = field(default_factory=list[str])
    acknowledged: int = -1

    def process(self, name: str) -> Steps:
        replica = Replica(self.bucket, name)
        for _ in range(self.rng.randrange(1, 6)):
            kind = self.rng.random()
            if kind < 0.7:
                commands = [self.command(name) for _ in range(self.rng.randrange(1, 3))]
                answers, how = yield from replica.append(commands)
                if how == "ok":
                    self.answered.update(answers)
                    self.note_acknowledged(replica)
                if how == "failed":
                    self.failed.update(command[0] for command in commands)
            elif kind < 0.8:
                before = self.acknowledged
                yield from replica.refresh()
                if replica.position is None or replica.position < before:
                    self.wrong.append(f"{name} read {replica.position}, and {before} was known")
            elif kind < 0.9:
                yield from replica.snapshot()
            else:
                yield from replica.collect()
            self.check(replica)

    def note_acknowledged(self, replica: Replica) -> None:
        """Note that the entries up to the position of a replica are known to a caller."""
        assert replica.position is not None
        self.acknowledged = max(self.acknowledged, replica.position)

    def command(self, name: str) -> Command:
        self.commands += 1
        kind: Literal["take", "free"] = "take" if self.rng.random() < 0.5 else "free"
        return self.commands, kind, self.rng.choice("ab"), name

    def check(self, replica: Replica) -> None:
        """Check that a replica is what the log makes of nothing."""
        if replica.position is None:
            return
        state: State = {}
        for number in range(replica.position + 1):
            if number not in self.bucket.truth:
                self.wrong.append(f"{replica.name}: {number} was never written")
                return
            apply(state, self.bucket.truth[number], self.bucket.off)
        fresh = self.bucket.time - replica.contact <= TRUSTED
        if state != replica.state and fresh:
            self.wrong.append(f"{replica.name} at {replica.position}: {replica.state}, not {state}")

    def check_answers(self) -> None:
        """Check that each command counted once, and as it was answered."""
        state: State = {}
        counted: dict[int, bool] = {}
        for number in sorted(self.bucket.truth):
            before = state.get("time", 0)
            answers = apply(state, self.bucket.truth[number], self.bucket.off)
            if not before <= state["time"] <= self.bucket.time:
                self.wrong.append(f"the time goes from {before} to {state['time']} at {number}")
            for command, answer in answers.items():
                if command in counted:
                    self.wrong.append(f"command {command} counted twice")
                counted[command] = answer
        for command, answer in self.answered.items():
            if counted.get(command) != answer:
                self.wrong.append(f"command {command}: {answer}, not {counted.get(command)}")
        self.wrong += [f"command {each} failed, and counted" for each in self.failed & set(counted)]


def run(seed: int, off: str | None = None) -> str | None:
    """Play a schedule, and return what is wrong with it.

    Args:
        seed: of the schedule.
        off: the mechanism that is switched off.
    """
    rng = random.Random(seed)
    played = Run(rng, Bucket(rng, off))
    processes: dict[str, Steps] = {}
    started = 0
    for _ in range(260):
        draw = rng.random()
        if draw < 0.06 and started < 8:
            started += 1
            processes[f"p{started}"] = played.process(f"p{started}")
        elif draw < 0.08 and processes:
            processes.pop(rng.choice(list(processes)))  # killed
        elif draw < 0.3:
            for _ in range(rng.choice([1, 1, 1, 3, 30])):  # at times everything stalls
                played.bucket.tick()
        elif processes:
            name = rng.choice(list(processes))
            if next(processes[name], "ended") == "ended":
                del processes[name]
        if played.wrong:
            break
    played.check_answers()
    return f"seed {seed}: {'; '.join(played.wrong[:3])}" if played.wrong else None


if __name__ == "__main__":
    runs, first = int(sys.argv[1]), int(sys.argv[2])
    mechanism = sys.argv[3] if len(sys.argv) > 3 else None
    for seed in range(first, first + runs):
        if found := run(seed, mechanism):
            print(found)
