"""The public interface is what its snapshot says: a change of it is seen, and made on purpose.

`FENNFLOW_UPDATE_INTERFACE=1 pytest tests/meta` writes the snapshot again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("interface.txt")
PACKAGES = {
    "fennflow": "fennflow-core",
    "fennflow_bucket": "fennflow-bucket",
    "fennflow_django": "fennflow-django",
    "fennflow_fsspec": "fennflow-fsspec",
    "fennflow_memory": "fennflow-memory",
    "fennflow_obstore": "fennflow-obstore",
    "fennflow_s3": "fennflow-s3",
    "fennflow_sqlalchemy": "fennflow-sqlalchemy",
}


def described(name: str, item: Any) -> Iterator[str]:
    """Return a line for an object, and one for each of its public members."""
    try:
        item = item.final_target if item.is_alias else item
    except griffe.AliasResolutionError:
        yield f"{name} (of another package)"
        return
    if item.is_function:
        yield f"{name}{signature(item)}"
    elif item.is_class:
        bases = ", ".join(str(base) for base in item.bases)
        yield f"class {name}({bases})"
        for member in sorted(item.members):
            if not member.startswith("_"):
                yield from described(f"{name}.{member}", item.members[member])
    elif item.is_attribute:
        value = "" if item.annotation is None else f": {item.annotation}"
        yield f"{name}{value}"


def signature(function: Any) -> str:
    parameters = ", ".join(
        f"{'*' if p.kind is griffe.ParameterKind.var_positional else ''}"
        f"{'**' if p.kind is griffe.ParameterKind.var_keyword else ''}"
        f"{p.name}: {p.annotation}"
        f"{'' if p.default is None else f' = {p.default}'}"
        f"{' (keyword)' if p.kind is griffe.ParameterKind.keyword_only else ''}"
        for p in function.parameters
    )
    return f"({parameters}) -> {function.returns}"


def modules(package: Any) -> Iterator[Any]:
    yield package
    for name, member in sorted(package.members.items()):
        if not member.is_alias and member.is_module and name not in {"engine", "testing"}:
            yield from modules(member)


def interface() -> str:
    lines: list[str] = []
    for package, folder in PACKAGES.items():
        source = ROOT / folder / "src"
        loaded = griffe.load(package, search_paths=[source], resolve_aliases=True)
        for module in modules(loaded):
            for name in sorted(map(str, module.exports or ())):
                if name in module.members:
                    lines += described(f"{module.path}.{name}", module.members[name])
    return "\n".join(dict.fromkeys(lines)) + "\n"


def test_the_public_interface_is_what_its_snapshot_says() -> None:
    found = interface()
    if os.environ.get("FENNFLOW_UPDATE_INTERFACE"):
        SNAPSHOT.write_text(found)
    assert found.splitlines() == SNAPSHOT.read_text().splitlines()
