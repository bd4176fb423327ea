"""Any value for a config, a field or a template works or raises one of our exceptions, before any I/O."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel
from typing_extensions import override

from fennflow import ConfigDict
from fennflow.backends import InMemoryBackendConfig, SqlalchemyBackendConfig
from fennflow.config import BackendConfig, ConnectorConfig, ReconcileConfig
from fennflow.connectors import (
    Capabilities,
    InMemoryConnectorConfig,
    ObstoreConnectorConfig,
    S3ConnectorConfig,
)
from fennflow.exceptions import ConfigException, FennFlowException, KeyException
from fennflow.paths import PathModel
from fennflow.repositories import CrudRepository, RepoField
from fennflow_sqlalchemy.engines import open_databases

HUGE = 10**5000  # str() refuses it


class Odd:
    """Cannot be shown, compared or hashed."""

    __hash__ = None  # type: ignore[assignment]

    @override
    def __repr__(self) -> str:
        raise RuntimeError

    @override
    def __eq__(self, other: object) -> bool:
        raise RuntimeError


ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, HUGE, -HUGE, 1 << 31, 1 << 63, 10**400, 0.5, 5e-324, 1e308),
    *(float("inf"), float("-inf"), float("nan"), b"\xff", Odd(), Odd, [HUGE], {1: 2}, {"a": Odd()}),
    *(
        "",
        "9" * 5000,
        "inf",
        "\ud800",
        "\0",
        "a\nb",
        "\u202e",
        "{",
        "}",
        "..",
        "/",
        "%",
        "x" * 5000,
    ),
    *(Path("\ud800"), Path("a\0b"), Path("/"), {"endpoint": "http://["}, {"\ud800": "x"}),
)
PIECES = [
    *("sqlite", "postgresql", "http", "https", "s3", "file", "memory", "abfs", "gs"),
    *("://", "/", "//", ":", "@", "?", "#", "&", "=", "[", "]", "[::1]", "%", "%00", "%ff", "%zz"),
    *("host", "a", "b", "..", ".", "\0", "\n", "\ud800", "\u202e", " ", "65536", "-1", "5432", "x"),
    *("host=", "port=", "sslmode=", "timeout=", "statement_cache_size=", "server_settings=", "nan"),
    *("+psycopg", "+psycopg2", "connect_timeout=", "channel_binding=", "prefer"),
    *(
        "require",
        "application_name=",
        "prepared_statement_cache_size=",
        "uri=",
        "loop=",
        "9" * 5000,
    ),
]
URLS = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=5),
    st.lists(st.text(max_size=5), max_size=2),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    URLS,
)
CONFIGS: dict[type[BaseModel], dict[str, Any]] = {
    ConfigDict: {},
    ReconcileConfig: {},
    InMemoryConnectorConfig: {},
    S3ConnectorConfig: {},
    ObstoreConnectorConfig: {"url": "s3://"},
    InMemoryBackendConfig: {},
    SqlalchemyBackendConfig: {"url": "postgresql://app@127.0.0.1:9/app"},
}
FIELDS = [(config, name) for config in CONFIGS for name in config.model_fields]


def use(make: Callable[[], Any]) -> None:
    """Make a config, and use it as far as possible without opening anything."""
    with suppress(FennFlowException):
        config = make()
        repr(config)
        if isinstance(config, (ConnectorConfig, BackendConfig)):
            # Engines are shared by equal configs.
            assert {config: 1}[config.model_copy()] == 1
        if isinstance(config, SqlalchemyBackendConfig):
            with warnings.catch_warnings(action="error"):
                for each in open_databases(config, lease_ttl=1e9):
                    assert each.name == each.name.encode().decode()


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field[0].__name__}.{field[1]}")
def test_any_value_of_a_field_is_used_or_refused(field: tuple[type[BaseModel], str]) -> None:
    config, name = field
    for value in ODD:
        use(partial(config, **{**CONFIGS[config], name: value}))


@given(st.sampled_from(FIELDS), VALUES)
def test_drawn_values_of_fields_are_used_or_refused(
    field: tuple[type[BaseModel], str], value: Any
) -> None:
    config, name = field
    use(partial(config, **{**CONFIGS[config], name: value}))


@given(URLS)
@example("postgresql://h/db?foo=1")
@example("postgresql://h/db?port=x")
@example("postgresql://h/db?port=65536")
@example("postgresql://h/db?host=a&host=b")
@example("postgresql://h/db?prepared_statement_cache_size=x")
@example("postgresql://h/db?timeout=nan")
@example("postgresql://h/db?loop=x")
@example("postgresql://h/%00")
@example("sqlite:////")
@example("sqlite:///a?timeout=x")
@example("sqlite:///a?uri=maybe")
@example("http://[")
@example("http://host:65536")
@example("http://host:x")
@example("file:///%00")
@example("s3://[")
def test_any_url_is_used_or_refused(url: str) -> None:
    use(lambda: SqlalchemyBackendConfig(url=url))
    use(lambda: S3ConnectorConfig(endpoint_url=url, presign_endpoint_url=url))
    use(lambda: ObstoreConnectorConfig(url=url))
    use(lambda: ObstoreConnectorConfig(url="s3://", options={"endpoint": url}))


def test_a_journal_is_a_file_and_not_a_url_whose_password_would_be_shown() -> None:
    with pytest.raises(ConfigException, match="not a URL") as raised:
        SqlalchemyBackendConfig(url="sqlite:///a.db", journal="postgresql://u:geheim@h/d")
    assert "geheim" not in str(raised.value)


@pytest.mark.parametrize("name", Capabilities.__dataclass_fields__)
def test_capabilities_are_truth_values_and_known_words(name: str) -> None:
    for value in ODD:
        use(partial(_with_capability, name, value))


def _with_capability(name: str, value: Any) -> S3ConnectorConfig:
    given: Any = {name: value}
    with suppress(FennFlowException):
        S3ConnectorConfig(capabilities=given)
    return S3ConnectorConfig(capabilities=Capabilities(**given))


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_a_field_of_a_unit_of_work_takes_a_repository_and_a_name(value: Any) -> None:
    with pytest.raises(ConfigException):
        RepoField(value, namespace="files")
    if not isinstance(value, str) or not value or not value.isprintable():
        with pytest.raises(ConfigException):
            RepoField(CrudRepository, namespace=value)


@pytest.mark.parametrize(
    "template", ["{", "}", "{a", "{a!", "{a!z}", "{a:{a}}", "{}", "{b}", 5, None]
)
def test_a_template_that_cannot_be_rendered_is_refused_with_its_class(template: Any) -> None:
    with pytest.raises(KeyException):
        type("Broken", (PathModel,), {"template": template, "__annotations__": {"a": int}})


@given(st.text(max_size=12), st.one_of(st.integers(), st.just(HUGE)))
@example("{a:\ud800}", 1)
@example("{a:,_}", 1)
@example("{a}", HUGE)
def test_any_template_is_rendered_or_refused(template: str, value: int) -> None:
    with suppress(FennFlowException):
        model = type("Drawn", (PathModel,), {"template": template, "__annotations__": {"a": int}})
        model(a=value).render()
