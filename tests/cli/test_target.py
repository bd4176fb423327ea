"""Only the user's modules and their imports are found in the working directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shells import PROGRAM, Program

MARKER = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
raise ImportError("no such package")
"""


def ran(directory: Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.ran"))


@pytest.mark.parametrize("command", [[str(PROGRAM)], [sys.executable, "-m", "fennflow"]])
def test_files_in_the_working_directory_are_not_run(tmp_path: Path, command: list[str]) -> None:
    for name in ("uvloop", "opentelemetry", "aiosqlite", "greenlet"):
        (tmp_path / f"{name}.py").write_text(MARKER)
    (tmp_path / "app.py").write_text(
        "from fennflow import UnitOfWork\n\n\nclass UOW(UnitOfWork): ...\n"
    )
    done = subprocess.run(
        [*command, "transactions", "app:UOW"],
        cwd=tmp_path,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert ran(tmp_path) == []


def test_modules_of_the_user_find_each_other(program: Program) -> None:
    directory, module = program.directory, program.target.partition(":")[0]
    package = f"package_{module}"
    (directory / package).mkdir()
    (directory / package / "__init__.py").touch()
    (directory / package / "settings.py").write_text(
        "import importlib\n"
        f"import {module} as one\n"
        f"two = importlib.import_module('other_{module}')\n"
        "def later():\n"
        f"    import later_{module} as three\n"
        "    return three\n"
    )
    (directory / f"other_{module}.py").write_text(f"import {module}")
    (directory / f"later_{module}.py").write_text("")
    (directory / package / "storage.py").write_text(
        "from .settings import later, one\nlater()\nUOW = one.UOW\n"
    )
    program.target = f"{package}.storage:UOW"
    assert program("transactions").out == "No transaction is open.\n"


def test_a_unit_of_work_without_async_is_one_as_well(program: Program) -> None:
    source = program.directory / f"{program.target.partition(':')[0]}.py"
    both = source.read_text() + (
        "\n\nfrom fennflow.sync import SyncUnitOfWork\n\n\n"
        "class SyncUOW(SyncUnitOfWork):\n"
        '    files = RepoField(CrudRepository, namespace="bucket")\n'
        "    config = UOW.config\n"
    )
    source.write_text(both)
    (program.directory / "report.txt").write_bytes(b"Good")
    program.target = program.target.replace(":UOW", ":SyncUOW")
    assert program("cp", "report.txt", "files:").code == 0
    assert program("cat", "files:report.txt").out == "Good"
    assert program("transactions").out == "No transaction is open.\n"


def test_a_wrong_config_of_the_module_is_an_error_without_a_traceback(program: Program) -> None:
    source = program.directory / f"{program.target.partition(':')[0]}.py"
    source.write_text(source.read_text().replace("sqlite:///", "sqlit:///"))
    done = program("transactions")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("ConfigException: ")
    assert "Traceback" not in done.err


def test_an_installed_package_wins_over_the_working_directory(
    program: Program,
) -> None:
    module = program.target.partition(":")[0]
    source = program.directory / f"{module}.py"
    source.write_text(f"import colorsys\n{source.read_text()}")  # of the standard library
    sys.modules.pop("colorsys", None)
    (program.directory / "colorsys.py").write_text(MARKER)
    assert program("transactions").code == 0
    assert ran(program.directory) == []


def test_nothing_else_finds_the_working_directory(program: Program) -> None:
    (program.directory / "unknown_library.py").write_text(MARKER)
    assert program("transactions").code == 0
    with pytest.raises(ModuleNotFoundError):
        import unknown_library  # type: ignore[import-not-found]  # noqa: F401
    assert ran(program.directory) == []
