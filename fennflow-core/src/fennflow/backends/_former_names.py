"""The former names of the backend contract, for programs written before it used *transaction*.

Nothing in FennFlow uses them. `fennflow.backends` loads this module when a program imports
`SessionToken`; other programs never load it.
"""

from __future__ import annotations

import warnings
from typing import Any

from fennflow.backends.contract import Backend
from fennflow.backends.values import FINISHED, Record, Settlement, TransactionToken, WriteId

__all__: list[str] = []


def session_token() -> type[TransactionToken]:
    """Accept the former names from now on, and return the class formerly named `SessionToken`."""
    message = (
        "fennflow.backends.SessionToken is now TransactionToken, session_id is transaction_id, "
        "and Backend.stage is Backend.begin_writes."
    )
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    if not hasattr(Backend, "stage"):
        _accept()
    return TransactionToken


def _accept() -> None:
    def session_id(token: TransactionToken) -> str:
        return token.transaction_id

    async def stage(backend: Backend, *args: Any, **kwargs: Any) -> Any:
        return await backend.begin_writes(*args, **kwargs)

    make = Record.__init__

    def make_record(record: Record, **values: Any) -> None:
        if "session_id" in values:
            values["write"] = WriteId(values.pop("session_id"), values.pop("seq"))
        make(record, **values)

    for owner, name, value in (
        (TransactionToken, "session_id", property(session_id)),
        (Backend, "stage", stage),
        (Record, "__init__", make_record),
    ):
        setattr(owner, name, value)
    contract: Any = Backend
    _accept_settle(contract)
    of_later: Any = _accept_settle
    setattr(Backend, "__init_subclass__", classmethod(of_later))  # noqa: B010 - loaded later


def _accept_settle(backend: type[Backend], **_: object) -> None:
    """Let `settle` of a class and its subclasses accept the fields of a `Settlement`."""
    for each in backend.__subclasses__():
        _accept_settle(each)
    method: Any = vars(backend).get("settle")
    if method is None:
        return

    async def settle(
        self: Backend, token: Any, settlement: Settlement = FINISHED, **values: Any
    ) -> None:
        await method(self, token, Settlement(**values) if values else settlement)

    setattr(backend, "settle", settle)  # noqa: B010 - a type checker would refuse it
