"""How much of FennFlow one overwrite passes through, so that it does not grow unseen.

A layer that only forwards is found here first. A change that makes the path shorter lowers the numbers.
"""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path

FILES, FUNCTIONS = 36, 186


def test_an_overwrite_passes_through_no_more_files_and_functions_than_it_did() -> None:
    script = runpy.run_path(str(Path(__file__).with_name("overwrite_size.py")))
    functions = asyncio.run(script["passed"]())
    assert len({file for file, _ in functions}) <= FILES
    assert len(functions) <= FUNCTIONS
