"""A third party's plugin: built from the guide, installed with the wheels, and used there."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import textwrap
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from packages import ROOT, UV, main_job, run

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

EXAMPLE = ROOT / "examples" / "fennflow-localfs"
BLOCK = re.compile(r'^```\w+ title="(.+?)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def guide() -> dict[str, str]:
    """Return the files of the guide; what is shown in parts is put together."""
    parts: defaultdict[str, list[str]] = defaultdict(list)
    for path, text in BLOCK.findall((ROOT / "docs" / "plugins.md").read_text()):
        parts[path].append(text)
    return {path: "\n".join(texts) for path, texts in parts.items()}


def bare(text: str) -> list[str]:
    """Return the lines that are not empty: parts of a file end without their blank lines."""
    return [line for line in text.splitlines() if line]


def test_the_guide_shows_the_example_whole() -> None:
    files = {
        str(path.relative_to(EXAMPLE)): bare(path.read_text())
        for path in EXAMPLE.rglob("*")
        if path.is_file() and path.suffix in {".py", ".toml"}
    }
    assert {path: bare(text) for path, text in guide().items()} == files
    assert (EXAMPLE / "src" / "fennflow_localfs" / "py.typed").exists()


def test_the_example_knows_public_names_alone() -> None:
    for path in EXAMPLE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("fennflow") for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fennflow."):
                public = set(importlib.import_module(node.module or "").__all__)
                assert {alias.name for alias in node.names} <= public, path


@pytest.fixture(scope="session")
def environment(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with core, memory and pytest."""
    folder = tmp_path_factory.mktemp("third-party")
    run(UV, "venv", "--quiet", "--clear", "--python", sys.executable, folder)
    python = folder / "bin" / "python"
    [core] = wheels.glob("fennflow_core-*.whl")
    [memory] = wheels.glob("fennflow_memory-*.whl")
    with_commands = f"fennflow-core[cli] @ {core.as_uri()}"
    run(UV, "pip", "install", "--quiet", "--python", python, with_commands, memory, "pytest>=9.0")
    return python


@pytest.fixture
def installed(environment: Path, tmp_path: Path) -> Path:
    """Build and install what the guide leads to, from an empty folder."""
    for name, text in guide().items():
        path = tmp_path / "fennflow-localfs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "fennflow-localfs" / "src" / "fennflow_localfs" / "py.typed").touch()
    install(environment, tmp_path / "fennflow-localfs")
    return environment


def install(python: Path, source: Path) -> None:
    run(UV, "build", "--quiet", "--wheel", "--out-dir", source / "dist", source)
    [wheel] = (source / "dist").glob("*.whl")
    run(UV, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel)


def test_the_plugin_is_found_and_passes_the_suite(installed: Path, tmp_path: Path) -> None:
    found = run(
        *(installed, "-c"),
        "from fennflow import plugins; from fennflow.connectors import LocalFsConnectorConfig;"
        "print([(p.name, p.distribution, p.error) for p in plugins.installed()])",
    )
    assert "('localfs', 'fennflow-localfs', None)" in found
    output = run(
        *(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("--rootdir", tmp_path, tmp_path / "fennflow-localfs" / "tests"),
    )
    assert re.search(r"\d{2} passed", output)
    assert "failed" not in output
    # No order of imports ends in a cycle.
    run(installed, "-W", "error", "-c", "import fennflow_localfs")


def test_the_main_job_runs_on_it(installed: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    program = main_job()
    program = program.replace("S3ConnectorConfig()", f"LocalFsConnectorConfig(root={str(store)!r})")
    program = program.replace("S3ConnectorConfig", "LocalFsConnectorConfig")
    (tmp_path / "main.py").write_text(program)
    paths, files = run(installed, "-W", "error", tmp_path / "main.py").splitlines()
    assert paths.count("folder1/") == 3
    assert {"BinaryContent", "JsonContent", "TextContent"} == set(re.findall(r"\w+Content", files))
    # The next process fills its memory catalog from the directory.
    again = run(installed, "-W", "error", tmp_path / "main.py").splitlines()
    assert again[0] == paths


@pytest.mark.parametrize("name", ["fennflow-acme", "acme-cold-store"])
def test_what_new_plugin_makes_is_found_and_passes_the_suite(
    name: str, environment: Path, tmp_path: Path
) -> None:
    program = environment.parent / "fennflow"
    # The pip that comes with Python 3.11 knows extras, and no dependency groups.
    assert "pip install -e '.[dev]'" in run(program, "new-plugin", name, "--directory", tmp_path)
    made = tomllib.loads((tmp_path / name / "pyproject.toml").read_text())
    assert "dev" in made["project"]["optional-dependencies"]
    again = subprocess.run(
        [program, "new-plugin", name, "--directory", tmp_path], capture_output=True, check=False
    )
    assert again.returncode == 1
    install(environment, tmp_path / name)
    try:
        output = run(
            *(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--rootdir", tmp_path, tmp_path / name / "tests"),
        )
        assert re.search(r"\d{2} passed", output)
        assert "failed" not in output
        readme = (tmp_path / name / "README.md").read_text()
        example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
        assert example is not None
        run(environment, "-W", "error", "-c", example[1] + "\nUOW()")
    finally:
        run(UV, "pip", "uninstall", "--quiet", "--python", environment, name)


def test_the_demo_says_what_it_needs(environment: Path) -> None:
    done = subprocess.run(
        [environment.parent / "fennflow", "demo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'fennflow[demo]>=1.0'" in done.stderr
    assert "Traceback" not in done.stderr


PLUGIN = """
from fennflow.config import ConnectorConfig
from fennflow.hookspecs import ConnectorPlugin, hookimpl

class {name}ConnectorConfig(ConnectorConfig):
    pass

@hookimpl
def fennflow_connectors():
    return [ConnectorPlugin("{name}", {name}ConnectorConfig, lambda config, settings: None)]
"""


def package(folder: Path, distribution: str, *, plugin: str, code: str) -> Path:
    """Write a package with one module and an entry point."""
    module = distribution.replace("-", "_")
    source = folder / distribution
    (source / module).mkdir(parents=True)
    (source / module / "__init__.py").write_text(code)
    (source / "pyproject.toml").write_text(
        textwrap.dedent(
            f"""
            [build-system]
            requires = ["hatchling>=1.27"]
            build-backend = "hatchling.build"

            [project]
            name = "{distribution}"
            version = "0.1"

            [project.entry-points.fennflow]
            {plugin} = "{module}"
            """
        )
    )
    return source


def test_plugins_that_do_not_work_break_no_other(installed: Path, tmp_path: Path) -> None:
    bad = {
        "broken": "import there_is_no_such_driver",
        "misspelt": PLUGIN.format(name="Misspelt").replace("_connectors()", "_conectors()"),
        "newer": "FENNFLOW_HOOKSPEC_VERSION = 2\n" + PLUGIN.format(name="Newer"),
    }
    for name, code in bad.items():
        install(installed, package(tmp_path, f"acme-{name}", plugin=name, code=code))
    try:
        report = run(
            *(installed, "-W", "error", "-c"),
            "from fennflow import UnitOfWork, plugins; UnitOfWork();"
            "from fennflow.connectors import LocalFsConnectorConfig;"
            "print(*[f'{p.name}: {p.error}' for p in plugins.installed()], sep='\\n')",
        ).splitlines()
        said = dict(line.split(": ", 1) for line in report)
        assert "No module named 'there_is_no_such_driver'" in said["broken"]
        assert "did you mean fennflow_connectors?" in said["misspelt"]
        assert "built for version 2" in said["newer"]
        assert {name for name, error in said.items() if error == "None"} == {
            "core",
            "localfs",
            "memory",
        }
        done = subprocess.run(
            [installed, "-c", "from fennflow.connectors import MisspeltConnectorConfig"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "PluginException: No working plugin provides" in done.stderr
        assert "acme-misspelt 0.1" in done.stderr
    finally:
        names = [f"acme-{name}" for name in bad]
        run(UV, "pip", "uninstall", "--quiet", "--python", installed, *names)


def test_two_plugins_of_one_name_are_an_error_that_names_both(
    installed: Path, tmp_path: Path
) -> None:
    code = PLUGIN.format(name="Other")
    install(installed, package(tmp_path, "acme-localfs", plugin="localfs", code=code))
    construct = "from fennflow import UnitOfWork; UnitOfWork()"
    try:
        done = subprocess.run(
            [installed, "-c", construct], capture_output=True, text=True, check=False
        )
        assert "PluginException: Provided twice" in done.stderr
        assert "acme-localfs" in done.stderr
        assert "fennflow-localfs" in done.stderr
        run(installed, "-c", construct, FENNFLOW_DISABLE_PLUGINS="localfs")
    finally:
        run(UV, "pip", "uninstall", "--quiet", "--python", installed, "acme-localfs")
