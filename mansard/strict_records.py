"""A tree of YAML as frozen dataclasses, strictly: an unknown or missing key, or a value of another type, is one line.

Paths are relative to the file's folder; dates become moments in UTC.
"""

import dataclasses
import difflib
import os
import types
import typing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from mansard.errors import BadInput


def read(kind: Any, value: Any, where: str, folder: Path) -> Any:  # noqa: ANN401 - a value of type `kind`
    """`value` as `kind` (dataclass, tuple, dict, Path or scalar), or BadInput that names the place."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where, folder)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else read(arguments[0], value, where, folder)
    if origin is tuple:
        if not isinstance(value, list):
            raise BadInput(f"{where}: {value!r} is not a list")
        return tuple(read(arguments[0], v, f"{where}[{i}]", folder) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise BadInput(f"{where}: {value!r} is not a mapping")
        return {str(k): read(arguments[1], v, f"{where}.{k}", folder) for k, v in value.items()}
    if kind is Path:
        if not isinstance(value, str):
            raise BadInput(f"{where}: {value!r} is not a path")
        # Not resolved: an interpreter in a virtual environment is a link that must stay one.
        return Path(os.path.normpath(folder / Path(value).expanduser()))
    if kind is datetime:
        return _moment(value, where)
    if type(value) is not kind:
        raise BadInput(f"{where}: {value!r} is not of type {kind.__name__}")
    return value


def _moment(value: object, where: str) -> datetime:
    """A date is its first moment; without a time zone it is UTC. YAML has read most forms already."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError as error:
            raise BadInput(f"{where}: {value!r} is not a date (2027-01-31) or a moment (ISO 8601)") from error
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    if not isinstance(value, datetime):
        raise BadInput(f"{where}: {value!r} is not a date (2027-01-31) or a moment (ISO 8601)")
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _record(kind: Any, value: Any, where: str, folder: Path) -> Any:  # noqa: ANN401 - an instance of `kind`
    if not isinstance(value, dict):
        raise BadInput(f"{where}: {value!r} is not a mapping of keys")
    fields = {f.metadata.get("key", f.name): f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise BadInput(f"{where}: unknown key {key!r}; {hint}")
    for name, spec in fields.items():
        missing = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if missing and name not in value:
            raise BadInput(f"{where}: key {name!r} is missing")
    names = {key: spec.name for key, spec in fields.items()}
    return kind(**{names[k]: read(hints[names[k]], v, f"{where}: {k}", folder) for k, v in value.items()})
