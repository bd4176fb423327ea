"""The benchmarks run; what they measure is never asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]


@pytest.mark.once
def test_the_benchmarks_run(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--sizes", "1", "3", "--latencies", "0", "--repeats", "1", "--large", "16"]
    options += ["--no-postgresql", "--no-peer", "--servers", "cheap", "cheap, versioned bucket"]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "run.py", *options, "--json", report],
        check=True,
        timeout=300,
    )
    measured = json.loads(report.read_text())["seconds"]
    assert set(measured) == {"cheap, 0 ms", "large", "cheap, versioned bucket, 0 ms"}
    assert set(measured["cheap, 0 ms"]["create 3"]) >= {
        "aiobotocore",
        "obstore",
        "FennFlow, memory",
        "FennFlow, SQLite",
        "FennFlow, obstore",
        "FennFlow, without async",
    }


@pytest.mark.thorough
def test_the_benchmarks_of_large_catalogs_run(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--records", "2000", "--transactions", "20", "--objects", "50", "--lease", "3"]
    options += ["--units", "8"]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "scale.py", *options, "--json", report],
        check=True,
        timeout=300,
    )
    assert {tuple(row) for row in json.loads(report.read_text()).values()} == {
        ("SQLite", "PostgreSQL")
    }


@pytest.mark.thorough
def test_the_benchmarks_of_the_catalog_in_the_bucket_run(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--processes", "2", "--units", "3", "--records", "2000", "--latency", "1"]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "bucket.py", *options, "--json", report],
        check=True,
        timeout=110,
    )
    assert {"opened with a copy", "slowest in a hundred"} < set(json.loads(report.read_text()))
