"""Building the packages of this repository, and running programs with them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
PACKAGES = [
    "fennflow",
    "fennflow_bucket",
    "fennflow_core",
    "fennflow_django",
    "fennflow_fsspec",
    "fennflow_memory",
    "fennflow_obstore",
    "fennflow_s3",
    "fennflow_sqlalchemy",
]


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PYTEST_ADDOPTS": ""} | environment,  # a package has plugins of its own
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def main_job() -> str:
    """Return the program in the README, which is the one of the design word for word."""
    found = re.search(
        r"## The main job.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert found is not None
    return found[1]
