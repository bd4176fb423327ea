"""The interface without `async` is what the asynchronous one says.

`FENNFLOW_UPDATE_INTERFACE=1 pytest tests/meta` writes it again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sync_interface import FILES


@pytest.mark.parametrize(
    ("path", "generate"), FILES.items(), ids=lambda each: getattr(each, "name", "")
)
def test_the_interface_without_async_is_generated(path: Path, generate: Callable[[], str]) -> None:
    text = generate()
    if os.environ.get("FENNFLOW_UPDATE_INTERFACE"):
        path.write_text(text)
    assert path.read_text() == text, "FENNFLOW_UPDATE_INTERFACE=1 pytest tests/meta"
