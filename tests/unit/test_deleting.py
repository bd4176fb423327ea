"""A key that a server refuses in a batch of deletions must not count as deleted."""

from __future__ import annotations

from typing import Any

import pytest

from fennflow.connectors import Deletion, Location
from fennflow.exceptions import AccessDeniedException
from fennflow_s3.deleting import delete_batch


class Server:
    """Refuses deletions, and names them in its own way.

    Args:
        named: how.
    """

    def __init__(self, *named: dict[str, str]) -> None:
        self._errors = [{"Code": "AccessDenied", "Message": "no", **each} for each in named]

    async def delete_objects(self, **_: Any) -> Any:
        return {"Errors": self._errors}


A = Deletion(location=Location("a", "1"))
B = Deletion(location=Location("b b", "2"))


@pytest.mark.parametrize("named", [{"Key": "b b", "VersionId": "2"}, {"Key": "b b"}])
async def test_a_refusal_is_found_by_its_key_with_or_without_a_version(
    named: dict[str, str],
) -> None:
    server: Any = Server(named)
    report = await delete_batch(server, "files", [A, B])
    assert [type(each) for each in report.errors] == [type(None), AccessDeniedException]


@pytest.mark.parametrize("named", [{"Key": "b%20b"}, {"Key": "b b", "VersionId": "3"}, {}])
async def test_a_refusal_of_which_the_key_is_not_known_refuses_the_batch(
    named: dict[str, str],
) -> None:
    server: Any = Server(named)
    with pytest.raises(AccessDeniedException):
        await delete_batch(server, "files", [A, B])
