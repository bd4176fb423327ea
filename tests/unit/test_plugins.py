"""Discovery, with real distributions on the path: good, broken, misspelt, doubled, too new."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fennflow import ConfigDict, UnitOfWork, plugins
from fennflow.backends import InMemoryBackendConfig
from fennflow.config import ConnectorConfig
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.exceptions import ConfigException, PluginException
from fennflow.files import TextContent
from fennflow.hookspecs import BackendPlugin, ConnectorPlugin, ContentTypePlugin, hookimpl

Install = Callable[..., None]

GOOD = """
    from fennflow.config import ConnectorConfig
    from fennflow.hookspecs import ConnectorPlugin, hookimpl

    class MyStoreConnectorConfig(ConnectorConfig):
        pass

    @hookimpl
    def fennflow_connectors():
        return [ConnectorPlugin("{name}", MyStoreConnectorConfig, lambda config, settings: None)]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with one module and an entry point for it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(distribution: str, code: str, *, name: str) -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code).replace("{name}", name))
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        )
        (info / "entry_points.txt").write_text(f"[fennflow]\n{name} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def error_of(name: str) -> str:
    [plugin] = [each for each in plugins.installed() if each.name == name]
    return "" if plugin.error is None else str(plugin.error)


def test_a_third_partys_config_is_importable_by_name(install: Install) -> None:
    install("acme-mystore", GOOD, name="mystore")
    with plugins.override():
        from fennflow.connectors import MyStoreConnectorConfig  # type: ignore[attr-defined]

        registry = plugins.registry()
        assert registry.connector_for(MyStoreConnectorConfig()).name == "mystore"
        [plugin] = [each for each in plugins.installed() if each.name == "mystore"]
        assert (plugin.distribution, plugin.version, plugin.error) == ("acme-mystore", "1.2", None)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import there_is_no_such_driver", "No module named 'there_is_no_such_driver'"),
        ("raise ValueError('bad day')", "ValueError: bad day"),
        ("raise SystemExit('no driver')", "SystemExit: no driver"),
        (GOOD.replace("def fennflow_connectors", "def fennflow_conectors"), "did you mean"),
        (GOOD.replace("    @hookimpl\n", ""), "is not marked with"),
        ("x = 1", "implements no hook"),
        ("FENNFLOW_HOOKSPEC_VERSION = 2\n" + textwrap.dedent(GOOD), "version 2 of FennFlow's"),
        (GOOD.replace("return [", "return 7 # "), "TypeError"),
        (GOOD.replace("return [", "return ['s'] # "), "is not a ConnectorPlugin"),
    ],
    ids=[
        "import",
        "raises",
        "exits",
        "misspelt",
        "unmarked",
        "empty",
        "version",
        "no list",
        "wrong item",
    ],
)
def test_a_plugin_that_does_not_work_breaks_no_other(
    install: Install, code: str, said: str
) -> None:
    install("acme-broken", code, name="broken")
    with plugins.override():
        assert said in error_of("broken")
        assert "acme-broken 1.2" in error_of("broken")
        UnitOfWork()
        from fennflow.connectors import S3ConnectorConfig

        assert plugins.registry().connector_for(S3ConnectorConfig()).name == "s3"
        with pytest.raises(PluginException, match="acme-broken") as caught:
            from fennflow.connectors import MyStoreConnectorConfig  # type: ignore[attr-defined]  # noqa: F401
        assert isinstance(caught.value.__cause__, PluginException)


def test_two_plugins_of_one_name_are_an_error_that_names_both(install: Install) -> None:
    install("acme-mystore", GOOD, name="mystore")
    install("other-mystore", GOOD, name="mystore")
    with plugins.override():
        with pytest.raises(PluginException, match=r"\w+-mystore and \w+-mystore"):
            UnitOfWork()
        assert len([each for each in plugins.installed() if each.name == "mystore"]) == 2
    with plugins.override(disable=["mystore"]):
        UnitOfWork()


class _Connector(ConnectorConfig):
    pass


_SameName = type("InMemoryConnectorConfig", (ConnectorConfig,), {})


class _Text(TextContent):
    pass


class _Other(TextContent):
    pass


def _module(
    name: str,
    *,
    connectors: Sequence[tuple[str, type]] = (),
    backends: Sequence[tuple[str, type]] = (),
    content_types: Sequence[tuple[Any, ...]] = (),
) -> ModuleType:
    """Return a plugin module with the hooks for what it provides."""

    def fennflow_connectors() -> list[ConnectorPlugin]:
        return [ConnectorPlugin(*each, lambda *_: None) for each in connectors]  # type: ignore[arg-type]

    def fennflow_backends() -> list[BackendPlugin]:
        return [BackendPlugin(*each, lambda *_: None) for each in backends]  # type: ignore[arg-type]

    def fennflow_content_types() -> list[ContentTypePlugin]:
        return [ContentTypePlugin(*each) for each in content_types]

    hooks = (fennflow_connectors, fennflow_backends, fennflow_content_types)
    module = ModuleType(name)
    vars(module).update({hook.__name__: hookimpl(hook) for hook in hooks})
    return module


@pytest.mark.parametrize(
    ("brought", "said"),
    [
        ({"connectors": [("acme", InMemoryConnectorConfig)]}, "config InMemoryConnectorConfig"),
        ({"connectors": [("memory", _Connector)]}, "connector name 'memory'"),
        ({"connectors": [("acme", _SameName)]}, "connector config InMemoryConnectorConfig"),
        ({"backends": [("acme", InMemoryBackendConfig)]}, "backend config InMemoryBackendConfig"),
        ({"content_types": [("acme", TextContent)]}, "content class TextContent"),
        ({"content_types": [("text", _Text)]}, "content type tag 'text'"),
        ({"content_types": [("acme", _Text, ("text/*",))]}, "media type 'text/\\*'"),
        (
            {"content_types": [("a", _Text, ("x/y",)), ("b", _Other, ("x/y",))]},
            "media type 'x/y'",
        ),
    ],
)
def test_what_two_plugins_bring_is_an_error_that_names_both(
    brought: dict[str, list[Any]], said: str
) -> None:
    """Otherwise one of them would be used by chance."""
    with (
        plugins.override(_module("fennflow_acme", **brought)),
        pytest.raises(PluginException, match=rf"Provided twice: .*{said} by .*fennflow_acme"),
    ):
        UnitOfWork()


@pytest.mark.parametrize("media_type", ["Text/CSV", "csv", "text/", "*/*", "text/csv; charset=x"])
def test_a_media_type_that_would_never_match_is_reported(media_type: str) -> None:
    module = _module("fennflow_acme", content_types=[("acme", _Text, (media_type,))])
    with plugins.override(module):
        assert "lower case" in error_of("fennflow_acme")


def test_plugins_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FENNFLOW_DISABLE_PLUGINS", "s3, other")
    with plugins.override():
        [plugin] = [each for each in plugins.installed() if each.name == "s3"]
        assert plugin.disabled
        with pytest.raises(PluginException, match="Switched off"):
            from fennflow.connectors import S3ConnectorConfig  # noqa: F401


def test_a_config_of_a_plugin_that_is_switched_off_is_refused_at_construction() -> None:
    class UOW(UnitOfWork):
        config = ConfigDict()

    UOW()
    with (
        plugins.override(disable=["memory"]),
        pytest.raises(PluginException, match="InMemoryConnectorConfig"),
    ):
        UOW()


def test_a_mistyped_name_is_an_import_error_with_a_hint() -> None:
    with plugins.override(), pytest.raises(ImportError, match="Did you mean S3ConnectorConfig"):
        from fennflow.connectors import S3ConectorConfig  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize("name", ["SqlalchemyBackendConfig", "SqlachemyBackendConfig"])
def test_for_a_durable_backend_that_is_not_installed_its_extra_is_named(name: str) -> None:
    with pytest.raises(ImportError, match=r"pip install 'fennflow\[sqlite\]>=1\.0'") as caught:
        plugins._named(lambda _: [InMemoryBackendConfig], name, "fennflow.backends")
    assert "InMemory" not in str(caught.value)


def test_every_config_of_ours_that_is_not_in_core_has_an_extra() -> None:
    ours = {
        plugin.config.__name__
        for found in (plugins.registry().connectors, plugins.registry().backends)
        for plugin in found
        if plugin.config.__module__.startswith("fennflow_")
    }
    known = {name for names in plugins._EXTRAS.values() for name in names}
    assert ours - known == {"InMemoryConnectorConfig", "InMemoryBackendConfig"}


def test_discovery_happens_once() -> None:
    assert plugins.registry() is plugins.registry()


def test_a_subclass_of_a_content_type_is_stored_as_that_type() -> None:
    class Letter(TextContent):
        pass

    assert plugins.registry().content_tag(Letter) == "text"


@pytest.mark.parametrize(
    "values",
    [
        {"lock_timeout": -1},
        {"max_concurrency": 0},
        {"no_such_option": 1},
        {"connector": {}},
        {"backend": "memory"},
        {"reserved_prefix": "../x"},
    ],
)
def test_a_config_that_cannot_work_is_refused(values: dict[str, object]) -> None:
    from fennflow.exceptions import FennFlowException

    with pytest.raises(FennFlowException):
        ConfigDict(**values)


def test_a_class_with_another_config_is_refused_when_it_is_made() -> None:
    with pytest.raises(ConfigException, match="ConfigDict"):

        class UOW(UnitOfWork):
            config = {"connector": 1}  # type: ignore[assignment]  # noqa: RUF012


@pytest.mark.parametrize(
    "module",
    ["fennflow_bucket", "fennflow_memory", "fennflow_obstore", "fennflow_s3", "fennflow.files"],
)
def test_importing_discovers_nothing_so_that_plugins_may_be_imported_first(module: str) -> None:
    code = f"import {module}, fennflow; from fennflow import plugins; print(plugins._current)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stderr, done.stdout) == ("", "None\n")


def test_declaring_a_unit_of_work_imports_nothing_that_only_running_one_needs() -> None:
    """Functions and command lines start often."""
    code = """
import sys
from fennflow import ConfigDict, UnitOfWork
from fennflow.files import TextContent
from fennflow.repositories import CrudRepository, RepoField

class UOW(UnitOfWork):
    files = RepoField(CrudRepository, namespace="bucket")

print(*sorted(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    running = {
        f"fennflow.engine.{name}"
        for name in [
            "session",
            "commit",
            "finish",
            "recovery",
            "reconcile",
            "garbage",
            "walking",
            "adopting",
        ]
    }
    libraries = {"aiobotocore", "aiohttp", "obstore", "rich", "sqlalchemy", "sqlite3", "typer"}
    assert imported & (running | libraries | {"fennflow.sync", "fennflow.testing"}) == set()
