"""All checks, one session each; `nox` runs them all. CONTRIBUTING.md says what each is for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

PYTHONS = ["3.11", "3.12", "3.13"]
ROOT = Path(__file__).parent
PACKAGES = [
    "fennflow-core",
    "fennflow-memory",
    "fennflow-obstore",
    "fennflow-s3",
    "fennflow-sqlalchemy",
]
SOURCES = [f"{package}/src" for package in PACKAGES]

# Interpreters are used where they are installed; uv must not download any.
os.environ["UV_PYTHON_DOWNLOADS"] = "never"
if shutil.which("pyenv"):
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [each.name for each in versions.glob("3.*") if each.name.rpartition(".")[0] in PYTHONS]
    os.environ["PYENV_VERSION"] = ":".join(sorted(found))

nox.needs_version = ">=2026.4"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"


def sync(session: nox.Session, group: str) -> None:
    """Install the workspace, editable, with one dependency group."""
    session.run_install(
        "uv",
        "sync",
        "--no-default-groups",
        f"--group={group}",
        f"--python={session.virtualenv.location}",
        "--quiet",
        env={"UV_PROJECT_ENVIRONMENT": session.virtualenv.location},
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format with ruff."""
    sync(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check", "--diff")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy and pyright, both strict."""
    sync(session, "dev")
    session.run("mypy")
    session.run("pyright", "--pythonpath", f"{session.virtualenv.bin}/python")


@nox.session
def imports(session: nox.Session) -> None:
    """Check which module may import which."""
    sync(session, "dev")
    session.run("lint-imports")


@nox.session
def dependencies(session: nox.Session) -> None:
    """Check that every package declares what it imports, and imports what it declares."""
    sync(session, "lint")
    # Modules that are not named like what brings them.
    modules = {
        "aiobotocore": "aiobotocore|aiohttp|botocore",
        "fennflow-core": "fennflow",
        "moto": "moto|werkzeug",
        "opentelemetry-api": "opentelemetry",
        "pydantic": "pydantic|pydantic_core",
    }
    named = ",".join(f"{package}={names}" for package, names in modules.items())
    for source in SOURCES:
        with session.chdir((ROOT / source).parent):
            session.run("deptry", "src", "--package-module-name-map", named)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests, with real servers; `nox -s tests -- -k name` picks some."""
    sync(session, "test")
    chosen = "not packaging and not docs and not crashes"
    if session.python != PYTHONS[0]:
        chosen += " and not once"
    session.run("pytest", "-n2", "-m", chosen, *session.posargs)


@nox.session
def packaging(session: nox.Session) -> None:
    """Build the wheels, install them into empty environments, and use them there."""
    sync(session, "test")
    session.run("pytest", "-m", "packaging", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Run every snippet of README, docs and docstrings, build the site, and follow its links."""
    sync(session, "site")
    session.run("pytest", "-n2", "-m", "docs", *session.posargs)


@nox.session
def crashes(session: nox.Session) -> None:
    """Kill processes at a sample of all boundaries; FENNFLOW_SEED repeats one."""
    sync(session, "test")
    session.run("pytest", "-n2", "-m", "crashes", *session.posargs)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Search by coverage for input that breaks its reader; `nox -s fuzz -- 10` for ten minutes each."""
    sync(session, "test")
    session.install("atheris>=3.0")
    seconds = 60 * int(session.posargs[0]) if session.posargs else 60
    for target in ("keys", "tokens", "metadata", "ranges", "contents", "variants", "configs"):
        artifacts = f"-artifact_prefix={session.create_tmp()}/"
        session.run("python", "tests/fuzz/fuzz.py", target, f"-max_total_time={seconds}", artifacts)


@nox.session(default=False)
def site(session: nox.Session) -> None:
    """Build the documentation into build/site; `nox -s site -- serve` shows it while you write."""
    sync(session, "site")
    arguments = session.posargs or ["build", "--strict", "--site-dir", "build/site"]
    session.run("mkdocs", *arguments, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def benchmarks(session: nox.Session) -> None:
    """Measure FennFlow beside others, and draw it; `nox -s benchmarks -- --help` tells the options."""
    sync(session, "benchmarks")
    report = f"{session.create_tmp()}/report.json"
    session.run("python", "benchmarks/run.py", "--json", report, *session.posargs)
    if not session.posargs:
        session.run("python", "benchmarks/plots.py", report, "docs/images")
        session.run("python", "benchmarks/scale.py")


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Ask for known weaknesses of all that users install with us; needs the network."""
    sync(session, "examples")
    session.install("pip-audit>=2.9")
    session.run("pip-audit", "--local", "--skip-editable", *session.posargs)


@nox.session(default=False)
def model(session: nox.Session) -> None:
    """Search for schedules that break an invariant; `nox -s model -- 120` for 120 minutes each way."""
    sync(session, "test")
    minutes, *others = session.posargs or ["15"]
    env = {"FENNFLOW_MODEL_MINUTES": minutes}
    session.run("pytest", "-n2", "tests/model/test_model.py", *others, env=env)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Load a server that fails at random; `nox -s soak -- 30` for 30 minutes on each database."""
    sync(session, "test")
    minutes, *others = session.posargs or ["10"]
    env = {"FENNFLOW_SOAK_MINUTES": minutes}
    session.run("pytest", "tests/faults/test_soak.py", *others, env=env)


@nox.session(default=False)
def all_crashes(session: nox.Session) -> None:
    """Kill processes at every boundary, on every store and database; takes about half an hour."""
    sync(session, "test")
    env = {"FENNFLOW_ALL_CRASHES": "yes"}
    session.run("pytest", "-n2", "-m", "crashes", *session.posargs, env=env)
