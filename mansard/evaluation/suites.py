"""A suite's snapshot: suite.json (what it is) and items.jsonl (the items, canonical, one a line).

Every item is checked when the snapshot is made, so that a suite that cannot be judged is refused before any engine
starts. `limit` takes items evenly over the file, so that it keeps as many source files as it can. A suite of kind
`harness` has no items of ours: its snapshot names the task.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mansard.canonical import canonical_json
from mansard.errors import BadInput
from mansard.records import SnapshotId

if TYPE_CHECKING:
    from mansard.specs.judging import Suite
    from mansard.store.store import Store

Item = dict[str, Any]

_KEYS: dict[str, dict[str, type]] = {
    "bits_per_byte": {"id": str, "file": str, "text": str},
    "multiple_choice": {"id": str, "file": str, "context": str, "choices": list, "answer": int},
}


def take_suite(store: "Store", suite: "Suite", data: Path) -> SnapshotId:
    """Check the suite's items under the folder `data` and take them into the store; BadInput names file and line."""
    return store.put_files(suite_files(suite, data))


def suite_files(suite: "Suite", data: Path) -> dict[str, bytes]:
    """The files of the suite's snapshot."""
    items: list[Item] = [] if suite.items is None else _limited(read_items(suite, data / suite.items), suite.limit)
    description = {
        "format": 1,
        "name": suite.name,
        "kind": suite.kind,
        "task": suite.task,
        "limit": suite.limit,
        "num_items": len(items),
        "num_files": len({i["file"] for i in items}),
    }
    return {
        "suite.json": canonical_json(description) + b"\n",
        "items.jsonl": b"".join(canonical_json(i) + b"\n" for i in items),
    }


def read_items(suite: "Suite", path: Path) -> list[Item]:
    """The checked items of a suite file, in the file's order, with the keys of their kind only."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BadInput(f"suite {suite.name}: {path}: cannot read the items: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"suite {suite.name}: {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    items: list[Item] = []
    seen: dict[str, int] = {}
    asked: dict[bytes, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"suite {suite.name}: {path}:{number}"
        item = _checked(suite.kind, line, where)
        if item["id"] in seen:
            raise BadInput(f"{where}: id {item['id']!r} is also on line {seen[item['id']]}; each item needs its own")
        content = canonical_json({key: value for key, value in item.items() if key not in ("id", "file")})
        if content in asked:
            raise BadInput(f"{where}: the same item as on line {asked[content]}; each counts once, so remove one")
        seen[item["id"]] = asked[content] = number
        items.append(item)
    if not items:
        raise BadInput(f"suite {suite.name}: {path}: no items; one JSON object a line is expected")
    return items


def parse_items(data: bytes) -> list[Item]:
    """The items of a snapshot's items.jsonl."""
    return [json.loads(line) for line in data.split(b"\n") if line]


def _limited(items: list[Item], limit: int | None) -> list[Item]:
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _checked(kind: str, line: str, where: str) -> Item:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{where}: {line[:60]!r} is not a JSON object")
    for key, wanted in _KEYS[kind].items():
        if key not in raw:
            raise BadInput(f"{where}: key {key!r} is missing; a {kind} item has {', '.join(_KEYS[kind])}")
        if type(raw[key]) is not wanted:
            raise BadInput(f"{where}: {key} is {raw[key]!r:.60}, of type {wanted.__name__} it must be")
    item = {key: raw[key] for key in _KEYS[kind]}
    if kind == "multiple_choice":
        _check_choices(item, where)
    for text in (item["id"], item["file"], item.get("text", "-")):
        if not text:
            raise BadInput(f"{where}: id, file and text must not be empty")
    try:
        canonical_json(item)
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: holds half a surrogate pair, which is not text: {error.reason}") from error
    return item


def _check_choices(item: Item, where: str) -> None:
    choices, answer = item["choices"], item["answer"]
    if len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise BadInput(f"{where}: choices must be two or more texts, none empty")
    if len(set(choices)) != len(choices):
        raise BadInput(f"{where}: choices has a text twice, so the right one is not clear")
    if not 0 <= answer < len(choices):
        raise BadInput(f"{where}: answer {answer} is not one of {len(choices)} positions (0 is the first)")
