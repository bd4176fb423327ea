"""The project keeps its own conventions."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest

import fennflow
from fennflow import exceptions, hookspecs, repositories

ROOT = Path(__file__).parents[2]
PROTOCOL = ROOT / "docs" / "protocol.md"
RULE = re.compile(r"\b(?:P[1-9]\d?|I[1-9])\b")


def rules() -> set[str]:
    """Return the rules and invariants of the protocol page, each of which has an anchor."""
    return {each.upper() for each in re.findall(r'<a id="([pi]\d+)">', PROTOCOL.read_text())}


def cited(*patterns: str) -> dict[str, set[Path]]:
    """Return the rules that files cite, and where."""
    found: dict[str, set[Path]] = {}
    for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
        for rule in RULE.findall(path.read_text()):
            found.setdefault(rule, set()).add(path.relative_to(ROOT))
    return found


def test_every_rule_has_one_anchor_and_begins_with_its_number() -> None:
    text = PROTOCOL.read_text()
    assert len(rules()) == len(re.findall("<a id=", text)) == 47
    assert set(re.findall(r"</a>\*\*([PI]\d+)\.", text)) == rules()


def test_every_rule_that_is_cited_is_on_the_protocol_page() -> None:
    found = cited("fennflow-*/src/**/*.py", "docs/**/*.md", "tests/**/*.py", "*.md")
    assert {rule: where for rule, where in found.items() if rule not in rules()} == {}


def test_every_rule_is_cited_by_a_test() -> None:
    assert rules() - set(cited("tests/**/*.py", "fennflow-core/**/*_suite.py")) == set()


def test_no_two_test_modules_have_one_name() -> None:
    """Pytest imports them by their names alone, and collects neither."""
    names = Counter(path.name for path in ROOT.glob("tests/**/test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_hook_is_documented_with_its_signature() -> None:
    guide = (ROOT / "docs" / "plugins.md").read_text()
    for name in [name for name in hookspecs.__all__ if name.startswith("fennflow_")]:
        hook = getattr(hookspecs, name)
        signature = str(inspect.signature(hook)).replace("'", "")
        assert f"{name}{signature}" in guide


def test_the_exception_tree_is_drawn_as_it_is() -> None:
    drawn = re.findall(
        r"^([│├└─ ]*)(\w+)(?: \(a warning\))?$", exceptions.__doc__ or "", re.MULTILINE
    )
    parents: dict[int, str] = {}
    found: dict[str, str] = {}
    for indent, name in drawn:
        if not hasattr(exceptions, name):
            continue
        depth = len(indent) // 4
        parents[depth] = name
        found[name] = parents.get(depth - 1, "Exception")
    assert found == {
        name: getattr(exceptions, name).__bases__[0].__name__ for name in exceptions.__all__
    }


def test_the_page_on_errors_shows_the_same_tree() -> None:
    tree = (exceptions.__doc__ or "").split("```")[1]
    assert f"```text{tree}```" in (ROOT / "docs" / "errors.md").read_text()


def test_every_mixin_has_a_line_in_the_docs() -> None:
    page = (ROOT / "docs" / "repositories.md").read_text()
    for name in repositories.__all__:
        if name.endswith("Repository") and name != "Repository":
            assert f"`{name}`" in page
    options = (ROOT / "docs" / "configuration.md").read_text()
    for option in (*fennflow.ConfigDict.model_fields, *fennflow.ReconcileConfig.model_fields):
        assert f"`{option}`" in options


PUBLIC = [
    name
    for _, name, is_package in pkgutil.walk_packages(fennflow.__path__, "fennflow.")
    if not name.startswith(("fennflow.engine", "fennflow.testing."))
    and name not in {"fennflow.files.plugin", "fennflow.files.media_types"}
]


@pytest.mark.parametrize("name", ["fennflow", *PUBLIC])
def test_what_a_module_exports_exists_and_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    exported = getattr(module, "__all__", [])
    assert list(exported) == sorted(
        exported, key=lambda each: (not each.isupper(), not each[0].isupper(), each)
    )
    for each in exported:
        value = getattr(module, each)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, each


def test_the_command_line_prints_in_one_place() -> None:
    printing = re.compile(
        r"\bprint\(|Console\(|\becho\(|\bsecho\(|\bconfirm\(|std(out|err)\.(write|buffer)"
    )
    printed = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "fennflow-core/src/fennflow/cli").glob("*.py")
        if path.name != "terminal.py"
        for line in path.read_text().splitlines()
        if printing.search(line)
    ]
    # It flushes what was written through the terminal.
    assert printed == ["files.py: sys.stdout.buffer.flush()"]


def test_no_module_outgrows_what_can_be_read_in_one_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in ROOT.glob("fennflow-*/src/**/*.py")
        if (lines := (text := path.read_text()).count("\n")) > 700
        and "do not edit" not in text.partition("\n")[0]  # it is generated, and read by none
    }
    assert long == {}


def test_the_architecture_page_names_every_module_of_core_and_the_engine() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    core = ROOT / "fennflow-core/src/fennflow"
    modules = {path.name for folder in (core, core / "engine") for path in folder.glob("*.py")}
    packages = {f"{path.parent.name}/" for path in core.glob("*/__init__.py")}
    missing = {
        name for name in modules | packages if not name.startswith("__") and name not in page
    }
    assert missing == set()


def test_the_map_of_the_phases_names_functions_that_exist() -> None:
    section = PROTOCOL.read_text().partition("## Where the code is")[2]
    table = section.partition("| phase |")[2].partition("\n## ")[0]
    sources = [
        *(ROOT / "fennflow-core/src/fennflow/engine").glob("*.py"),
        ROOT / "fennflow-core/src/fennflow/uow.py",
        *(ROOT / "fennflow-sqlalchemy/src/fennflow_sqlalchemy").glob("*.py"),
    ]
    missing, text = list[str](), ""
    for named in re.findall(r"`([\w.]+)`", table):
        if named.endswith(".py"):
            text = "".join(path.read_text() for path in sources if path.name == named)
        elif not all(re.search(rf"(?:def|class) {name}\b", text) for name in named.split(".")):
            missing.append(named)
    assert missing == []


def requirements() -> list[tuple[str, str]]:
    """Return the install lines of pages, messages, examples and templates, and where they are."""
    patterns = (
        "*.md",
        "docs/**/*.md",
        "fennflow-*/*.md",
        "fennflow-*/src/**/*.*",
        "examples/**/*.*",
    )
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return [
        (str(path.relative_to(ROOT)), name)
        for path in files
        if path.suffix in {".md", ".py", ".tmpl"}
        for name in re.findall(r"pip install (?:-\S+ )*'?(fennflow[^'`\s]*)", path.read_text())
    ]


def test_install_lines_name_one_published_name_and_its_minimum_version() -> None:
    """The index has an older project under this name, and the names of the parts may be taken."""
    found = requirements()
    assert len(found) > 15
    assert [
        each for each in found if not re.fullmatch(r"fennflow(\[[\w,{}]+\])?>=1\.0", each[1])
    ] == []


def test_the_template_of_a_plugin_depends_on_a_published_name_alone() -> None:
    template = ROOT / "fennflow-core/src/fennflow/cli/plugin_template/pyproject.toml.tmpl"
    for file in (template, ROOT / "examples/fennflow-localfs/pyproject.toml"):
        lines = "".join(re.findall(r"^(?:dependencies|dev) = .*$", file.read_text(), re.MULTILINE))
        named = re.findall(r'"(fennflow[^"]*)"', lines)
        assert named
        assert all(re.fullmatch(r"fennflow(\[\w+\])?>=1\.0,<2", name) for name in named)
