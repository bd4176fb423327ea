"""The examples run as the README says, without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_quickstart_shows_objects_and_an_untouched_bucket() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "default", "examples/quickstart.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("folder1/numbers.json: JsonContent [1, 2, 3]") == 2
    assert "inside: ['hello.txt', 'new.txt', 'raw.txt']" in done.stdout
    untouched = done.stdout.partition("is untouched:")[2]
    assert untouched.split("\n")[1:4] == [
        "  folder1/hello.txt: b'Hello, world!'",
        "  folder1/numbers.json: b'[1,2,3]'",
        "  folder1/raw.txt: b'some bytes'",
    ]


def test_the_main_job_runs_in_memory() -> None:
    """On S3 servers it runs in tests/packaging and tests/docs."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    program = found[1].replace("S3ConnectorConfig", "InMemoryConnectorConfig")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    paths, files = done.stdout.splitlines()
    assert paths.count("folder1/") == 3
    assert {"BinaryContent", "JsonContent", "TextContent"} == set(re.findall(r"\w+Content", files))
