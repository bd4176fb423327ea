"""`fennflow demo` reports what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).parent / "fennflow"
FIRST = {"anna.txt": "first version", "bert.txt": "first version", "carl.txt": "first version"}
SECOND = {"anna.txt": "second version", "bert.txt": "second version", "carl.txt": "second version"}


def demo(directory: Path, *options: str) -> str:
    environment = {"PATH": os.environ["PATH"], "PYTHONWARNINGS": "error", "TMPDIR": str(directory)}
    done = subprocess.run(
        [PROGRAM, "demo", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(directory.iterdir()) == []
    return done.stdout


def letters(seen: dict[str, str]) -> dict[str, str]:
    return {key: text for key, text in seen.items() if not key.startswith(".fennflow/")}


@pytest.mark.once
def test_the_demo_kills_and_recovers_as_it_says(tmp_path: Path) -> None:
    reported = json.loads(demo(tmp_path, "--json"))
    for step in ("committed", "after_exception", "compensated"):
        assert reported[step] == FIRST
    assert letters(reported["killed_before_commit"]) == FIRST
    assert len(reported["killed_before_commit"]) > len(FIRST)
    half = letters(reported["killed_while_committing"])
    assert set(half.values()) == {"first version", "second version"}
    assert reported["read_meanwhile"] == reported["rolled_forward"] == SECOND


@pytest.mark.once
def test_the_demo_explains_each_step(tmp_path: Path) -> None:
    text = demo(tmp_path)
    for title in ("One unit of work", "An exception", "killed before", "killed while", "rolled 1"):
        assert title in text
