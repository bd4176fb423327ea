"""The benchmarks run; what they measure is never asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.once
def test_the_benchmarks_run(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--sizes", "1", "3", "--latencies", "0", "--repeats", "1", "--large", "16"]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "run.py", *options, "--json", report],
        check=True,
        timeout=100,
    )
    measured = json.loads(report.read_text())["seconds"]
    assert set(measured) == {"0 ms", "large", "0 ms, versioned bucket"}
    assert set(measured["0 ms"]["create 3"]) == {
        "aiobotocore",
        "FennFlow, memory",
        "FennFlow, SQLite",
    }
