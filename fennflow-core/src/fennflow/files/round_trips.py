"""Compares values with the values that are read back from their stored form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import cast

from pydantic import BaseModel

DEEPEST = 20
"""How deep a fault is searched for in a value."""


def first_difference(given: object, back: object, *, json: bool = False) -> str | None:
    """Return where a value differs from what was read back; None where it does not.

    Unlike `==`, it treats NaN as equal to NaN, ignores private attributes of models, which are not
    stored, and returns the place.

    Args:
        given: the value.
        back: what was read back.
        json: whether lists may stand for tuples, as JSON has no other way.

    Returns:
        a path such as `lines.0.price`; empty for the value itself.
    """
    parts, others = _parts(given), _parts(back)
    alike = type(back) is type(given) or (json and isinstance(given, (list, tuple)))
    if parts is not None and others is not None and (alike or isinstance(given, Mapping)):
        for name in dict.fromkeys([*parts, *others]):
            if name not in parts or name not in others:
                return str(name)
            where = first_difference(parts[name], others[name], json=json)
            if where is not None:
                return f"{name}.{where}" if where else str(name)
        return None
    if isinstance(given, float) and isinstance(back, float) and math.isnan(given):
        return None if math.isnan(back) else ""
    return None if _equal(given, back) else ""  # pyright: ignore[reportUnknownArgumentType]


def first_fault(value: object, dump: Callable[[object], object], *, json: bool = False) -> str:
    """Return the path of the part that keeps a value from being dumped.

    Args:
        value: the value.
        dump: raises for what cannot be dumped.
        json: whether models and dataclasses count as having no parts, since JSON does not know
            them.

    Returns:
        a path such as `lines.0.price`; empty for the value itself.
    """
    path: list[str] = []
    seen: set[int] = set()
    while id(value) not in seen and len(path) < DEEPEST:
        seen.add(id(value))
        has_parts = not json or issubclass(type(value), (dict, list, tuple))
        parts = _parts(value) if has_parts else None
        for name, part in (parts or {}).items():
            try:
                dump(part)
            except (TypeError, ValueError, RecursionError):
                path.append(str(name))
                value = part
                break
        else:
            break
    return ".".join(path)


def _parts(value: object) -> Mapping[object, object] | None:
    """Return the parts of a value, by name or number; None if it has none."""
    if isinstance(value, BaseModel):
        fields = {name: value.__dict__.get(name) for name in type(value).model_fields}
        return cast("Mapping[object, object]", {**fields, **(value.__pydantic_extra__ or {})})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name, None) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return cast("Mapping[object, object]", value)
    if isinstance(value, (list, tuple)):
        return dict[object, object](enumerate(cast("list[object]", value)))
    return None


def _equal(given: object, back: object) -> bool:
    try:
        if type(given).__eq__ is object.__eq__ and type(given) is type(back):
            return given is back or vars(given) == vars(back)
        return bool(given == back) or _one_instant(given, back)
    except Exception:  # noqa: BLE001 - of a foreign type: what cannot be compared is not known to be equal
        return False


def _one_instant(given: object, back: object) -> bool:
    # In the hour that repeats when a zone puts its clocks back, `==` treats a time as unequal to
    # the same instant in any other zone. JSON stores the offset, so the time is read back in
    # another zone.
    if not isinstance(given, datetime) or not isinstance(back, datetime):
        return False
    if given.utcoffset() is None or back.utcoffset() is None:
        return False
    return given.astimezone(UTC) == back.astimezone(UTC)
