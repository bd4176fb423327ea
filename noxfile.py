"""All checks, one session each; `nox` runs them all. CONTRIBUTING.md says what each is for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

AZURITE = "3.35.0"
PYTHONS = ["3.11", "3.12", "3.13"]
ROOT = Path(__file__).parent
PACKAGES = [
    "fennflow-bucket",
    "fennflow-core",
    "fennflow-django",
    "fennflow-fsspec",
    "fennflow-memory",
    "fennflow-obstore",
    "fennflow-s3",
    "fennflow-sqlalchemy",
]
SOURCES = [f"{package}/src" for package in PACKAGES]
# The tests for every Python except the first, which runs everything.
PORTABLE = "not (packaging or docs or crashes or thorough or once)"
PORTABLE_STORES = (
    "not (juicefs or seaweedfs or strict or versioned or suspended or weak or obstore)"
    " and (contract or not (moto or postgresql or psycopg))"
)

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


def install_azurite(session: nox.Session, npm: str, folder: str) -> str:
    """Install Azurite into a folder, and return the path of its program."""
    install = [npm, "install", "--no-save", "--no-package-lock", "--no-audit", "--no-fund"]
    session.run(*install, f"--prefix={folder}", f"azurite@{AZURITE}", "--silent", external=True)
    return f"{folder}/node_modules/.bin/azurite-blob"


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and language, which module imports which, and what packages declare."""
    sync(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check", "--diff")
    session.run("lint-imports")
    session.run("python", "tests/meta/test_plain_english.py")
    # Modules that are not named like their distribution.
    modules = {
        "aiobotocore": "aiobotocore|aiohttp|botocore|multidict",
        "fennflow-core": "fennflow",
        "moto": "moto|werkzeug",
        "opentelemetry-api": "opentelemetry",
        "pydantic": "pydantic|pydantic_core",
    }
    named = ",".join(f"{package}={names}" for package, names in modules.items())
    for source in SOURCES:
        with session.chdir((ROOT / source).parent):
            session.run("deptry", "src", "--package-module-name-map", named)


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy and pyright, both strict."""
    sync(session, "dev")
    session.run("mypy")
    session.run("pyright", "--pythonpath", f"{session.virtualenv.bin}/python")


@nox.session
def tests(session: nox.Session) -> None:
    """Run what the README's test command runs; `nox -s tests -- -k name` picks some."""
    sync(session, "test")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS[1:])
def pythons(session: nox.Session) -> None:
    """Run on each other Python what can differ: in memory and on SQLite, contracts on servers too."""
    sync(session, "test")
    if session.python == "3.12":
        session.install("django==4.2.*")  # the oldest one that there is support for
    session.run("pytest", "-m", PORTABLE, "-k", PORTABLE_STORES, *session.posargs)


@nox.session
def packaging(session: nox.Session) -> None:
    """Build the wheels, install them into empty environments, and use them there."""
    sync(session, "test")
    session.run("pytest", "-n0", "-m", "packaging", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Run every snippet of README, docs and docstrings, build the site, and follow its links."""
    sync(session, "site")
    session.run("pytest", "-m", "docs", *session.posargs)


@nox.session
def crashes(session: nox.Session) -> None:
    """Kill processes at a sample of all boundaries; FENNFLOW_SEED repeats one."""
    sync(session, "test")
    # Most of the time is spent waiting for leases to expire.
    session.run("pytest", "-n4", "-m", "crashes and not thorough", *session.posargs)


@nox.session(default=False)
def thorough(session: nox.Session) -> None:
    """Run in full what the gate samples: every boundary and store, and longer searches and loads."""
    sync(session, "test")
    env = {"FENNFLOW_THOROUGH": "yes", "FENNFLOW_MODEL_MINUTES": "3", "FENNFLOW_SOAK_MINUTES": "3"}
    marked = "crashes or sampled or thorough"
    session.run("pytest", "-n4", "-m", marked, *session.posargs, env=env)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Search by coverage for input that breaks its reader; `nox -s fuzz -- 10` for ten minutes each."""
    sync(session, "test")
    session.install("atheris>=3.0")
    seconds = 60 * int(session.posargs[0]) if session.posargs else 60
    targets = session.run("python", "tests/fuzz/fuzz.py", "--list", silent=True)
    for target in str(targets).split():
        artifacts = f"-artifact_prefix={session.create_tmp()}/"
        session.run("python", "tests/fuzz/fuzz.py", target, f"-max_total_time={seconds}", artifacts)


@nox.session(default=False)
def stores(session: nox.Session) -> None:
    """Measure the servers that run here, and write the results into docs/stores.md."""
    npm = shutil.which("npm")
    if npm is None:
        session.skip("npm, which installs Azurite, is not installed")
    sync(session, "test")
    folder = session.create_tmp()
    env = {"FENNFLOW_AZURITE": install_azurite(session, npm, folder), "AZURITE_VERSION": AZURITE}
    env["PYTHONPATH"] = "tests/support"
    session.run("python", "tests/support/measuring.py", "docs/stores.md", env=env)


@nox.session(default=False)
def site(session: nox.Session) -> None:
    """Build the documentation into build/site; `nox -s site -- serve` shows it while you write."""
    sync(session, "site")
    arguments = session.posargs or ["build", "--strict", "--site-dir", "build/site"]
    session.run("mkdocs", *arguments, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def benchmarks(session: nox.Session) -> None:
    """Measure FennFlow and alternatives, and draw the plots; `nox -s benchmarks -- --help` lists the options."""
    sync(session, "benchmarks")
    report = f"{session.create_tmp()}/report.json"
    session.run("python", "benchmarks/run.py", "--json", report, *session.posargs)
    if not session.posargs:
        session.run("python", "benchmarks/plots.py", report, "docs/images")
        session.run("python", "benchmarks/scale.py")
        session.run("python", "benchmarks/bucket.py")


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Check for known vulnerabilities of everything that users install with us; needs the network."""
    sync(session, "examples")
    session.install("pip-audit>=2.9")
    session.run("pip-audit", "--local", "--skip-editable", *session.posargs)


@nox.session(default=False)
def model(session: nox.Session) -> None:
    """Search for schedules that break an invariant; `nox -s model -- 120` for 120 minutes each way."""
    sync(session, "test")
    minutes, *others = session.posargs or ["15"]
    env = {"FENNFLOW_MODEL_MINUTES": minutes}
    session.run("pytest", "tests/model/test_model.py", *others, env=env)


@nox.session
def azurite(session: nox.Session) -> None:
    """Run the connectors' suite on Azurite, for Azure; npm installs it."""
    npm = shutil.which("npm")
    if npm is None:
        session.skip("npm, which installs Azurite, is not installed")
    sync(session, "test")
    env = {"FENNFLOW_AZURITE": install_azurite(session, npm, session.create_tmp())}
    session.run("pytest", "tests/contract/azurite_suite.py", *session.posargs, env=env)
