"""The wheels, built and installed into an empty environment, run the main job."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fennflow.testing import S3Server
from packages import PACKAGES, ROOT, UV, main_job, run
from stores import raw_client

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def empty_python(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """Return the Python of an environment that has `fennflow[s3]` and nothing of this checkout."""
    environment = tmp_path_factory.mktemp("environment")
    version = (ROOT / "VERSION").read_text().split('"')[1]
    run(UV, "venv", "--quiet", "--clear", "--python", sys.executable, environment)
    python = environment / "bin" / "python"
    pins = [f"{name.replace('_', '-')}=={version}" for name in PACKAGES if name != "fennflow"]
    run(
        *(UV, "pip", "install", "--quiet", "--python", python, "--find-links", wheels),
        *(f"fennflow[s3]=={version}", *pins),
    )
    return python


def test_every_distribution_is_built_with_one_version_and_is_typed(wheels: Path) -> None:
    version = (ROOT / "VERSION").read_text().split('"')[1]
    for package in PACKAGES:
        wheel = wheels / f"{package}-{version}-py3-none-any.whl"
        assert (wheels / f"{package}-{version}.tar.gz").exists()
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            [metadata] = [name for name in names if name.endswith("METADATA")]
            text = archive.read(metadata).decode()
        assert "License-Expression: MIT" in text
        assert "Requires-Python: >=3.11" in text
        labels = re.findall(r"^Project-URL: (\w+), https://", text, re.MULTILINE)
        assert labels == ["Source", "Documentation", "Changelog", "Issues"]
        # The package index shows the text without its neighbours.
        relative = re.findall(r"\]\((?!https://|#)[^)]*\)", text)
        assert relative == []
        modules = [name for name in names if name.endswith((".py", "py.typed"))]
        if package == "fennflow":
            assert modules == []
        else:
            assert any(name.endswith("/py.typed") for name in modules)


@pytest.mark.parametrize("kind", ["moto", "juicefs"])
def test_the_main_job_runs_word_for_word_from_the_wheels(
    kind: str, empty_python: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    server: S3Server = request.getfixturevalue(kind)
    program = main_job()
    # AWS and the JuiceFS gateway refuse an underscore in a bucket's name.
    bucket = "my_files" if kind == "moto" else "my-files"
    program = program.replace('bucket_name="my_files"', f'bucket_name="{bucket}"')

    async def make_bucket() -> None:
        async with raw_client(server) as client:
            await client.create_bucket(Bucket=bucket)

    asyncio.run(make_bucket())
    (tmp_path / "main.py").write_text(program)
    output = run(
        *(empty_python, "-W", "default", tmp_path / "main.py"),
        AWS_ENDPOINT_URL=server.url,
        AWS_ACCESS_KEY_ID=server.access_key,
        AWS_SECRET_ACCESS_KEY=server.secret_key,
        AWS_DEFAULT_REGION="us-east-1",
    )
    assert "Warning" not in output
    paths, files = output.splitlines()
    assert paths.count("folder1/") == 3
    assert {"BinaryContent", "JsonContent", "TextContent"} == set(re.findall(r"\w+Content", files))


def test_nothing_comes_from_this_checkout(empty_python: Path) -> None:
    script = (
        "import fennflow, fennflow_s3, fennflow_memory, importlib.metadata as m;"
        "print(fennflow.__file__, fennflow_s3.__file__, fennflow_memory.__file__);"
        "print(m.version('fennflow'))"
    )
    output = run(empty_python, "-c", script)
    assert str(ROOT / "fennflow-core") not in output
    assert output.count("site-packages") == 3


def test_without_the_s3_package_the_import_says_what_to_install(
    wheels: Path, tmp_path: Path
) -> None:
    run(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    [core] = wheels.glob("fennflow_core-*.whl")
    [memory] = wheels.glob("fennflow_memory-*.whl")
    run(UV, "pip", "install", "--quiet", "--python", python, core, memory)
    script = "from fennflow.connectors import S3ConnectorConfig"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: fennflow.connectors.S3ConnectorConfig is not installed: "
        "pip install 'fennflow[s3]>=1.0'"
    )
    assert "TypeError" not in run(python, "-c", "from fennflow import UnitOfWork; UnitOfWork()")


def test_discovery_imports_no_driver(empty_python: Path) -> None:
    script = (
        "import sys; from fennflow import UnitOfWork; UnitOfWork();"
        "from fennflow.connectors import S3ConnectorConfig;"
        "print([name for name in sys.modules if name.split('.')[0] in "
        "{'aiobotocore', 'botocore', 'aiohttp', 'sqlalchemy'}])"
    )
    assert run(empty_python, "-c", script) == "[]\n"
