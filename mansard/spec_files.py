"""Spec and suite files, read: every mistake is one line with file, key, value and what would be right."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from mansard.errors import BadInput
from mansard.specs.judging import Suite
from mansard.specs.part import Part
from mansard.specs.whole import Spec

T = TypeVar("T", bound=Part)


def load_spec(kind: type[T], path: Path) -> T:
    """Read a spec or suite file; BadInput names file, key, value and what would be right."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot read the spec: {error}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise BadInput(_first_error(kind, path, error)) from error


def load_suites(spec: Spec, spec_path: Path) -> list[Suite]:
    """The suite files of the gate, in the spec's order."""
    suites = [load_spec(Suite, spec_path.parent / role.suite) for role in spec.gate.suites]
    names = [s.name for s in suites]
    if len(set(names)) != len(names):
        raise BadInput(f"{spec_path}: gate.suites names a suite twice: {names}")
    return suites


def _first_error(kind: type[Part], path: Path, error: ValidationError) -> str:
    errors = error.errors()
    # A misspelt key is also a missing one; a list that is no literal says more as a list, a word as one of the known
    # words: the plainest error first.
    first = min(errors, key=lambda e: (e["type"] != "extra_forbidden", *_as_literal(e["type"], e["input"])))
    place = ".".join(str(p) for p in first["loc"] if "[" not in str(p)) or "spec"
    if first["type"] == "extra_forbidden":
        known = _known_keys(kind, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key {place!r}; {hint}"
    if first["type"] == "missing":
        return f"{path}: key {place!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict | Part) else f"{first['input']!r:.80}: "
    return f"{path}: {place}: {value}{message}" if first["loc"] else f"{path}: {message}"


def _as_literal(kind: str, value: object) -> tuple[bool, bool]:
    return kind == "literal_error" and not isinstance(value, str), kind != "literal_error"


def _known_keys(kind: Any, place: tuple[Any, ...]) -> list[str]:  # noqa: ANN401 - any annotation
    """Field names of the section at `place` (list indices are stepped over)."""
    for key in place:
        if isinstance(key, int):
            continue
        annotation = kind.model_fields[key].annotation if key in getattr(kind, "model_fields", {}) else None
        found = [a for a in _annotations(annotation) if isinstance(a, type) and issubclass(a, Part)]
        if not found:
            return []
        kind = found[0]
    return list(kind.model_fields)


def _annotations(annotation: Any) -> list[Any]:  # noqa: ANN401 - any annotation
    inner = getattr(annotation, "__args__", ())
    return [annotation, *(a for i in inner for a in _annotations(i))]
