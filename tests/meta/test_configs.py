"""The arguments of a config for type checkers are those that pydantic takes."""

from __future__ import annotations

import ast
import inspect

import pytest
from pydantic import BaseModel

from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import ObstoreConnectorConfig, S3ConnectorConfig


@pytest.mark.parametrize(
    "config", [ObstoreConnectorConfig, S3ConnectorConfig, SqlalchemyBackendConfig]
)
def test_the_arguments_that_are_typed_are_the_fields(config: type[BaseModel]) -> None:
    tree = ast.parse(inspect.getsource(config))
    [init] = [node for node in ast.walk(tree) if getattr(node, "name", None) == "__init__"]
    assert isinstance(init, ast.FunctionDef)
    assert {argument.arg for argument in init.args.kwonlyargs} == set(config.model_fields)
