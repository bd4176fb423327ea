"""What the server that forks processes for tests has imported and read, so that they need not."""

from __future__ import annotations

import asyncio

import rich.progress
import typer

import crashing
from fennflow.connectors import S3ConnectorConfig
from fennflow.engine import diagnosis
from fennflow_s3.client import client_context

__all__ = ["crashing", "rich", "typer"]

CONFIG = S3ConnectorConfig(
    region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
)


async def read_models() -> None:
    """Open a client, which sends nothing: botocore reads its models of S3 and of all regions."""
    async with client_context(CONFIG):
        pass


asyncio.run(read_models())
diagnosis.WRITES_WITHIN = 60.0  # as in tests that run in pytest's process
