"""The files of a verdict as people get them: those of its record, with the cost, which is kept beside it, put in."""

import json
from pathlib import Path
from typing import Any

from mansard.canonical import write_atomically
from mansard.evaluation.html_report import html_with_cost
from mansard.evaluation.report import with_cost
from mansard.records import Registration
from mansard.store.store import Store

FILES = ("verdict.json", "report.md", "report.html", "chart.png")


def published_files(store: Store, registration: Registration) -> dict[str, bytes]:
    """File name -> bytes; a record from before there was a page has none."""
    kept = store.manifest(registration.verdict_record).files
    files = {name: store.read_file(registration.verdict_record, name) for name in FILES if name in kept}
    cost = measured_cost(store, registration)
    if cost is not None:
        files["report.md"] = with_cost(files["report.md"].decode(), cost).encode()
        if "report.html" in files:
            files["report.html"] = html_with_cost(files["report.html"].decode(), cost).encode()
    return files


def write_report(store: Store, registration: Registration, version: int, folder: Path) -> Path:
    """The files below `folder`, in a folder of the version's own, which is returned. A repeat writes the same again."""
    own = folder / f"{registration.model_name}-{version}"
    for name, data in published_files(store, registration).items():
        write_atomically(own / name, data)
    return own


def measured_cost(store: Store, registration: Registration) -> dict[str, Any] | None:
    """cost.json of a version, None for a first one."""
    for stage, _, snapshot in registration.stages:
        if stage == "cost":
            found: dict[str, Any] = json.loads(store.read_file(snapshot, "cost.json"))
            return found
    return None
